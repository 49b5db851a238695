"""A tensor times a number."""

import triton.language as tl
from amtss_fast._compat.triton import jit_without_specialization as kernel


@kernel
def multiply(out, x, factor, n_elements: tl.int64, SKIP: tl.constexpr, LENGTH: tl.constexpr):
    """Writes out = x * factor; with SKIP, nothing if the factor is 1."""
    scale = tl.load(factor).to(tl.float32)
    # Decided on the device: the host would have to wait for the factor.
    if SKIP:
        n_elements = tl.where(scale == 1.0, 0, n_elements)
    begin = tl.program_id(0).to(tl.int64) * LENGTH
    for start in range(begin, n_elements, tl.num_programs(0) * LENGTH):
        index = start + tl.arange(0, LENGTH)
        wanted = index < n_elements
        y = tl.load(x + index, wanted, other=0).to(tl.float32) * scale
        tl.store(out + index, y.to(out.dtype.element_ty), wanted)
