"""Sums over the rows: the number of rows that count, and the loss.

Rows are cut into `PARTS` stretches of a program each, whose sums are added up by whoever needs the total. The order of
additions depends on the number of rows alone. Few rows are not worth a launch: the loss of up to `ONE_PROGRAM` rows is
added up by one program, and the labels of up to `FEW_ROWS` are counted by everyone who needs their number.
"""

import triton
import triton.language as tl

from .common import kernel

PARTS = tl.constexpr(64)
# Where the launch of a second kernel would take as long as the first.
ONE_PROGRAM = 65536
# Rows that a program has in flight, of its labels and of their losses.
COUNTED, BLOCK = 1024, 16384
# Up to here everyone counts the labels, so many at once.
FEW_ROWS, FEW = 512, tl.constexpr(256)


@triton.jit
def own_stretch(n_rows):
    length = tl.cdiv(n_rows, tl.num_programs(0))
    begin = tl.minimum(tl.program_id(0) * length, n_rows)
    return begin, tl.minimum(begin + length, n_rows)


@triton.jit
def count_labels(labels, begin, end, ignore_index, BLOCK: tl.constexpr):
    counts = tl.zeros((BLOCK,), tl.int32)
    for start in range(begin, end, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        counts += (tl.load(labels + rows, rows < end, other=ignore_index) != ignore_index).to(tl.int32)
    return tl.sum(counts, 0)


@kernel
def count_rows(labels, out, n_rows: tl.int64, ignore_index: tl.int64, BLOCK: tl.constexpr):
    """How many rows of each program's stretch count."""
    begin, end = own_stretch(n_rows)
    tl.store(out + tl.program_id(0), count_labels(labels, begin, end, ignore_index, BLOCK))


@triton.jit
def read_divisor(divisor, n_rows, ignore_index):
    """What divides a mean, by the type of `divisor`: a float, used as it is; or the number of rows that count.

    That is the sum of `PARTS` 32-bit integers, or counted in the labels, which have 64 bits; and at least 1.
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
    """The sum of each program's stretch of float32 numbers, divided where there is a divisor."""
    begin, end = own_stretch(n_rows)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        sums += tl.load(x + rows, rows < end, other=0)
    total = tl.sum(sums, 0)
    if divisor is not None:
        total /= read_divisor(divisor, n_rows, ignore_index)
    tl.store(out + tl.program_id(0), total)
