"""Sums over the rows: the number of rows that count, and the loss.

The rows are divided into `PARTS` stretches, one for each program. Each program that needs the total adds up the sums of
the stretches. The order of additions depends on the number of rows only.
"""

import triton
import triton.language as tl
from amtss_fast._compat.triton import jit_without_specialization as kernel

PARTS = tl.constexpr(64)
# Labels that a program loads at once if it counts them itself.
FEW = tl.constexpr(256)


@triton.jit
def own_stretch(n_rows):
    """Begin and end of this program's rows."""
    length = tl.cdiv(n_rows, tl.num_programs(0))
    begin = tl.minimum(tl.program_id(0) * length, n_rows)
    return begin, tl.minimum(begin + length, n_rows)


@triton.jit
def count_labels(labels, begin, end, ignore_index, BLOCK: tl.constexpr):
    """How many of labels[begin:end] are not `ignore_index`."""
    counts = tl.zeros((BLOCK,), tl.int32)
    for start in range(begin, end, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        counts += (tl.load(labels + rows, rows < end, other=ignore_index) != ignore_index).to(tl.int32)
    return tl.sum(counts, 0)


@kernel
def count_rows(labels, out, n_rows: tl.int64, ignore_index: tl.int64, BLOCK: tl.constexpr):
    """Writes how many rows of each program's stretch count."""
    begin, end = own_stretch(n_rows)
    tl.store(out + tl.program_id(0), count_labels(labels, begin, end, ignore_index, BLOCK))


@triton.jit
def read_divisor(divisor, n_rows, ignore_index):
    """What divides a mean. A float is used as it is; otherwise it is the number of rows that count, at least 1.

    That number is the sum of `PARTS` 32-bit integers, or is counted in the labels, which are 64-bit integers.
    """
    if divisor.dtype.element_ty.is_floating():
        number = tl.load(divisor).to(tl.float32)
    elif divisor.dtype.element_ty == tl.int32:
        number = tl.maximum(tl.sum(tl.load(divisor + tl.arange(0, PARTS)), 0), 1).to(tl.float32)
    else:
        number = tl.maximum(count_labels(divisor, 0, n_rows, ignore_index, FEW), 1).to(tl.float32)
    return number


@kernel
def add_rows(x, out, divisor, n_rows: tl.int64, ignore_index: tl.int64, BLOCK: tl.constexpr):
    """Writes the sum of each program's stretch of the float32 numbers `x`, divided by `divisor` unless that is None."""
    begin, end = own_stretch(n_rows)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        sums += tl.load(x + rows, rows < end, other=0)
    total = tl.sum(sums, 0)
    if divisor is not None:
        total /= read_divisor(divisor, n_rows, ignore_index)
    tl.store(out + tl.program_id(0), total)
