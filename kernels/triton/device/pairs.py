"""What the kernels for rows of any length pass on: pairs of numbers, each loaded and stored as one number."""

import triton
import triton.language as tl

# The pairs of a chunk are [N, chunks, 2] each. For the student: the maximum and sum exp2(b); the two logits of the
# margin (-inf if they are in other chunks); for the cross entropy sum exp2(b tau) and sum b.
STUDENT_CHUNK_PAIRS = tl.constexpr(3)
# For each teacher: the maximum and sum exp2(a); the two logits of the margin; the sum of `stream.relative_sum` and, for
# the stats, the sum of squares about the mean; the mean less the maximum, and the number of logits that are not -inf.
# For one with a list, see `lists.py`, only the first, of the student's logits without the listed ones.
TEACHER_CHUNK_PAIRS = tl.constexpr(4)
# The pairs of a row are [N, 2] each. For the student: the maximum and the factor of exp2(b); the factors of exp2(b tau)
# and of the target. For each teacher: the maximum and the factor of exp2(a). If the divergence is not the forward KL,
# the first of the student is the sum of all slopes and the factor of the gradient, and of a teacher only its factor
# is there.
STUDENT_PAIRS = tl.constexpr(2)


@triton.jit
def load_pair(pointer, mask=None):
    """Two consecutive numbers, 0 outside of `mask`."""
    pointer = pointer.to(tl.pointer_type(tl.int64))
    both = tl.load(pointer) if mask is None else tl.load(pointer, mask, other=0)
    return both.to(tl.int32).to(tl.float32, bitcast=True), (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def store_pair(pointer, a, b):
    low = a.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    high = b.to(tl.int32, bitcast=True).to(tl.int64) << 32
    tl.store(pointer.to(tl.pointer_type(tl.int64)), high | low)
