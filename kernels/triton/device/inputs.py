"""What a program reads besides logits: labels, weights and priors of its rows, and where each teacher's logits are."""

import triton
import triton.language as tl
from amtss_fast._compat.triton import jit_without_specialization as kernel

from .memory import load_tile


@triton.jit
def read_row_inputs(labels, sample_weight, rows, n_rows, n_classes, ignore_index, unlabeled_index):
    """Per row: whether it counts, its label (-1: none), whether the label is impossible, and its weight."""
    counts = rows < n_rows
    target = (rows * 0 - 1).to(tl.int32)
    invalid = counts & False
    if labels is not None:
        label = tl.load(labels + rows, counts, other=ignore_index)
        counts = counts & (label != ignore_index)
        possible = (label >= 0) & (label < n_classes)
        invalid = counts & (label != unlabeled_index) & (possible == 0)
        target = tl.where(counts & possible, label, -1).to(tl.int32)
    weight = counts.to(tl.float32)
    if sample_weight is not None:
        weight = tl.load(sample_weight + rows, counts, other=0).to(tl.float32)
    return counts, target, invalid, weight


@triton.jit
def read_prior(priors, k, rows, counts, n_rows):
    """The prior of teacher k; 0 where it does not teach the row."""
    prior, stride_k, stride_n, places = priors
    alpha = counts.to(tl.float32)
    if prior is not None:
        alpha = tl.load(prior + k * stride_k + rows * stride_n, counts, other=0).to(tl.float32)
    if places is not None:
        place = tl.load(places + k * n_rows + rows, counts, other=-1)
        alpha = tl.where(place < 0, 0.0, alpha)
    return tl.where(alpha > 0, alpha, 0.0)


@triton.jit
def read_exponent(exponents, k, exponent):
    """What turns logits of teacher k into bits; `exponent`, the student's, unless there is one for each teacher."""
    if exponents is not None:
        exponent = tl.load(exponents + k)
    return exponent


@triton.jit
def read_scales(scales, k, rows, counts, n_rows, n_teachers):
    """row_max and step of an 8-bit teacher; `scales`: [2, K, N], or None without 8-bit teachers."""
    row_max = (rows * 0).to(tl.float32)
    step = row_max
    if scales is not None:
        row_max = tl.load(scales + k * n_rows + rows, counts, other=0)
        step = tl.load(scales + (n_teachers + k) * n_rows + rows, counts, other=0)
    return row_max, step


@triton.jit
def pick(k, slots):
    """The address of one of eight tensors, of which the last four may be None."""
    t0, t1, t2, t3, t4, t5, t6, t7 = slots
    odd = (k & 1) != 0
    second = (k & 2) != 0
    low = tl.where(odd, t1.to(tl.int64), t0.to(tl.int64))
    high = tl.where(odd, t3.to(tl.int64), t2.to(tl.int64))
    address = tl.where(second, high, low)
    if t4 is not None:
        low = tl.where(odd, t5.to(tl.int64), t4.to(tl.int64))
        high = tl.where(odd, t7.to(tl.int64), t6.to(tl.int64))
        address = tl.where((k & 4) != 0, tl.where(second, high, low), address)
    return address


@triton.jit
def locate_teacher(k, teachers):
    """Address, row stride, class stride (elements) and kind of teacher k.

    The addresses of the first sixteen teachers are arguments: four, or eight, or two times eight. Without a table,
    teacher k lies k // 16 * `stack_stride` bytes after teacher k % 16. A table [K, 4] holds that distance, the strides
    and the kind of each teacher.
    """
    slots, more_slots, stack_stride, row_stride, class_stride, kinds, table = teachers
    address = pick(k, slots)
    if more_slots[0] is not None:
        address = tl.where((k & 8) != 0, pick(k, more_slots), address)
    kind = ((kinds >> (2 * k)) & 3).to(tl.int32)
    if table is not None:
        address += tl.load(table + 4 * k)
        row_stride = tl.load(table + 4 * k + 1)
        class_stride = tl.load(table + 4 * k + 2)
        kind = tl.load(table + 4 * k + 3).to(tl.int32)
    else:
        address += (k // 16) * stack_stride
    return address, row_stride, class_stride, kind


@triton.jit
def load_teacher(
    k, teachers, scales, places, tile, counts, wanted, n_rows, n_classes, n_teachers,
    KIND: tl.constexpr, GROUP: tl.constexpr, EVICTION: tl.constexpr,
):  # fmt: skip
    """:func:`memory.load_tile` of teacher k.

    `places` [K, N]: where the logits of each row are in the teacher's tensor, -1 where they are not; None: all teachers
    have all rows in order.
    """
    first, chunk, rows, columns, inside, size = tile
    if places is not None:
        # In Triton's interpreter, a comparison of float scalars gives a float.
        place = tl.load(places + k * n_rows + rows, counts.to(tl.int32) != 0, other=-1)
        wanted = (wanted.to(tl.int32) != 0) & (place >= 0)
        rows = tl.maximum(place, 0).to(tl.int64)
        # Of several rows, which then are loaded one by one, the first has no meaning.
        first = rows
    row_max, step = read_scales(scales, k, rows, counts, n_rows, n_teachers)
    address, row_stride, class_stride, kind = locate_teacher(k, teachers)
    source = (address, row_stride, class_stride, kind, row_max, step)
    return load_tile(source, wanted, (first, chunk, rows, columns, inside, size), n_classes, KIND, GROUP, EVICTION)


@kernel
def write_entry(table, k: tl.int32, beyond: tl.int64, row_stride: tl.int64, class_stride: tl.int64, kind: tl.int64):
    """Row k of the table of :func:`locate_teacher`."""
    tl.store(table + 4 * k, beyond)
    tl.store(table + 4 * k + 1, row_stride)
    tl.store(table + 4 * k + 2, class_stride)
    tl.store(table + 4 * k + 3, kind)


@kernel
def write_numbers(
    out, n: tl.int32,
    x0: tl.float32, x1: tl.float32, x2: tl.float32, x3: tl.float32,
    x4: tl.float32, x5: tl.float32, x6: tl.float32, x7: tl.float32,
):  # fmt: skip
    """Writes the first `n` of eight numbers."""
    at = tl.arange(0, 8)
    low = tl.where(at < 2, tl.where(at == 0, x0, x1), tl.where(at == 2, x2, x3))
    high = tl.where(at < 6, tl.where(at == 4, x4, x5), tl.where(at == 6, x6, x7))
    tl.store(out + at, tl.where(at < 4, low, high), at < n)


@kernel
def write_places(rows, places, n_rows: tl.int64, n_own: tl.int64, BLOCK: tl.constexpr):
    """Writes to places[row] where each of the `n_own` rows is in `rows`; None: all are there in order."""
    own = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = own
    if rows is not None:
        row = tl.load(rows + own, own < n_own, other=-1)
    tl.store(places + row, own.to(tl.int32), (own < n_own) & (row >= 0) & (row < n_rows))
