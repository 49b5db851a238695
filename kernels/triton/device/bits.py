"""Logits in bits: exponents of 2, less about the largest one of a row or chunk.

In rows and chunks that are a tile of their own, one instruction makes bits of a logit: x exponent less the product
top exponent, rounded. What that is rounded to does not matter as long as all bits that are compared have the same, and
the difference is small.
"""

import triton
import triton.language as tl

from .memory import across

# From here on it may be 1 and more.
LARGE = tl.constexpr(2.0**24)


@triton.jit
def in_bits(x, top, exponent):
    """`x` in bits, for a tile, or numbers, of one row or of several; `top`: of each row."""
    if len(x.shape) == 2:
        b = (x - across(top)) * exponent
    elif len(top.shape) == 1:
        b = (x - top) * exponent
    else:
        product = top * exponent
        if tl.abs(product) >= LARGE:
            # A barrier keeps the compiler from subtracting always.
            tl.debug_barrier()
            x -= top
            product = top * 0
        b = tl.fma(x, exponent, -product)
    return b


@triton.jit
def references_apart(tops, top, exponent):
    """What the bits of chunks with the largest logits `tops` are relative to, less what those of a row are."""
    chunks, row = tops * exponent, top * exponent
    chunk_is_large, row_is_large = tl.abs(chunks) >= LARGE, tl.abs(row) >= LARGE
    of_small = tl.where(chunk_is_large, tl.fma(tops, exponent, -row), chunks - row)
    of_large = tl.where(chunk_is_large, (tops - top) * exponent, -tl.fma(top, exponent, -chunks))
    return tl.where(row_is_large, of_large, of_small)


@triton.jit
def relative_sum(e, x, y, has_holes):
    """The sum of e (x - y) with e = exp2(x): 0 log 0 is 0, also where both are -inf. `has_holes`: whether y may be."""
    if has_holes:  # noqa: SIM108
        total = tl.sum(tl.where(e > 0, e * (x - y), 0.0), 0)
    else:
        # Below -1000, e is 0.
        total = tl.sum(e * (tl.maximum(x, -1000.0) - y), 0)
    return total
