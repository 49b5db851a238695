"""Rows of any length: statistics of chunks, their union per row, and one gradient pass over the same chunks.

Each program has one chunk of a row, so that few long rows keep a device as busy as many do. Each logit is read once for
the loss and once for the gradient. Between the two passes, memory holds a few numbers per chunk and teacher, each
relative to the largest logit of its chunk.
"""

import triton
import triton.language as tl
from amtss_fast._compat.triton import jit_without_specialization as kernel

from .inputs import find_teacher, read_prior, read_row_inputs
from .loss import (
    cross_entropy,
    cross_entropy_gradient,
    distillation_loss,
    divergence_of,
    gradient_factor,
    weighted_loss,
)
from .margins import LN2, admit, distance_of, margin_label, margin_of, spread_of, stand_out
from .memory import columns_of, load_tile, place_tile, store_tile

# The kernels pass on pairs of numbers, because a pair is loaded and stored as one number. The pairs of a chunk are
# [N, chunks, 2] each. For the student: the maximum and sum exp2(b); the two logits of the margin (-inf if they are in
# other chunks); for the cross entropy the label's logit and sum exp2(b tau), then sum b and the number of classes.
STUDENT_CHUNK_PAIRS = tl.constexpr(4)
# For each teacher: the maximum and sum exp2(a); the two logits of the margin; sum exp2(a) (a - b) and, for the stats,
# the sum of squares about the mean; the mean less the maximum, and the number of logits that are not -inf.
TEACHER_CHUNK_PAIRS = tl.constexpr(4)
# The pairs of a row are [N, 2] each. For the student: the maximum and the factor of exp2(b); the factors of exp2(b tau)
# and of the target. For each teacher: the maximum and the factor of exp2(a).
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


@kernel
def chunk_statistics(
    student, t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15, teacher_table,
    scales, labels, prior, fields, student_margin,
    row_stride: tl.int64, class_stride: tl.int64,
    teacher_stack: tl.int64, teacher_row_stride: tl.int64, teacher_class_stride: tl.int64, teacher_kinds: tl.int64,
    prior_stride_k: tl.int64, prior_stride_n: tl.int64,
    n_rows: tl.int64, n_classes: tl.int32, n_teachers: tl.int32, n_chunks: tl.int32,
    ignore_index: tl.int64, unlabeled_index: tl.int64, exponent: tl.float32, temperature: tl.float32,
    WEIGHTING: tl.constexpr, CE: tl.constexpr, STUDENT: tl.constexpr, TEACHER: tl.constexpr,
    GROUP: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    teachers = (
        (t0, t1, t2, t3, t4, t5, t6, t7), (t8, t9, t10, t11, t12, t13, t14, t15),
        teacher_stack, teacher_row_stride, teacher_class_stride, teacher_kinds, teacher_table,
    )  # fmt: skip
    row = tl.program_id(0).to(tl.int64) // n_chunks
    chunk = tl.program_id(0) % n_chunks
    tile = place_tile(student, row, chunk, row_stride, n_rows, n_classes, GROUP, 1, CLASSES)
    _, _, _, _, inside, _ = tile
    counts, target, _, weight = read_row_inputs(labels, None, row, n_rows, n_classes, ignore_index, unlabeled_index)
    compared = margin_label(target, WEIGHTING)
    plane = 2 * n_rows * n_chunks
    out = fields + 2 * (row * n_chunks + chunk)

    source = (student.to(tl.int64), row_stride, class_stride, 0, weight, weight)
    s, start = load_tile(source, counts, tile, n_classes, STUDENT, GROUP)
    if student_margin is not None:
        top, own, rest = stand_out(s, start, compared)
        store_pair(out + plane, own, rest)
    else:
        top = tl.max(s, 0)
    # All logits of a chunk may be -inf in a row with finite ones.
    b = (s - tl.where(top == float("-inf"), 0.0, top)) * exponent
    store_pair(out, top, tl.sum(tl.exp2(b), 0))
    if CE:
        label = tl.max(tl.where(columns_of(s, start) == target, s, float("-inf")), 0)
        store_pair(out + 2 * plane, label, tl.sum(tl.exp2(b * temperature), 0))
        store_pair(out + 3 * plane, tl.sum(tl.where(inside, b, 0.0), 0), tl.sum(inside.to(tl.float32), 0))
    out += STUDENT_CHUNK_PAIRS * plane

    for k in range(n_teachers):
        alpha = read_prior((prior, prior_stride_k, prior_stride_n), k, row, counts)
        source = find_teacher(k, teachers, scales, row, counts, n_rows, n_teachers)
        t, start = load_tile(source, alpha > 0, tile, n_classes, TEACHER, GROUP)
        top, own, rest = stand_out(t, start, compared)
        a = (t - tl.where(top == float("-inf"), 0.0, top)) * exponent
        e = tl.exp2(a)
        store_pair(out, top, tl.sum(e, 0))
        store_pair(out + plane, own, rest)
        kl = tl.sum(tl.where(e > 0, e * (a - b), 0.0), 0)
        if student_margin is not None:
            count, mean, squares = spread_of(t, top)
            store_pair(out + 2 * plane, kl, squares)
            store_pair(out + 3 * plane, mean, count)
        else:
            store_pair(out + 2 * plane, kl, 0.0 * alpha)
        out += TEACHER_CHUNK_PAIRS * plane


@triton.jit
def join_margins(pairs, held, tops, top, target):
    """The own and the largest other logit of :func:`stand_out` for a whole row, from its chunks."""
    labeled = target >= 0
    owns, rests = load_pair(pairs, held)
    own = tl.max(tl.where(held, owns, float("-inf")), 0)
    rest = tl.max(tl.where(held, rests, float("-inf")), 0)
    largest = tops == top
    second = tl.maximum(rest, tl.max(tl.where(largest, float("-inf"), tops), 0))
    second = tl.where(tl.sum(largest.to(tl.int32), 0) > 1, top, second)
    return tl.where(labeled, own, top), tl.where(labeled, rest, second)


@kernel
def join_chunks(
    labels, prior, sample_weight, divisor, fields, factors, normalizers,
    row_loss, weights, margins, kd, student_margin, teacher_scale,
    prior_stride_k: tl.int64, prior_stride_n: tl.int64,
    n_rows: tl.int64, n_classes: tl.int32, n_teachers: tl.int32, n_chunks: tl.int32,
    ignore_index: tl.int64, unlabeled_index: tl.int64,
    exponent: tl.float32, temperature: tl.float32, sharpness: tl.float32,
    kd_weight: tl.float32, ce_weight: tl.float32, label_smoothing: tl.float32,
    WEIGHTING: tl.constexpr, CHOICE: tl.constexpr, CE: tl.constexpr, CHUNKS: tl.constexpr, TEACHERS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    counts, target, invalid, weight = read_row_inputs(
        labels, sample_weight, row, n_rows, n_classes, ignore_index, unlabeled_index
    )
    labeled = target >= 0
    compared = margin_label(target, WEIGHTING)
    plane = 2 * n_rows * n_chunks
    chunks = tl.arange(0, CHUNKS)
    held = counts & (chunks < n_chunks)  # [CHUNKS]
    into_s = fields + 2 * (row * n_chunks + chunks)

    tops, totals_s = load_pair(into_s, held)
    tops = tl.where(held, tops, float("-inf"))
    top_s = tl.max(tops, 0)
    g = (tops - top_s) * exponent
    total_s = tl.sum(totals_s * tl.exp2(g), 0)
    log_total_s = tl.log2(total_s)
    if student_margin is not None:
        own, rest = join_margins(into_s + plane, held, tops, top_s, compared)
        margin = margin_of(own, rest, top_s, total_s, 1 / total_s, exponent, WEIGHTING)
        tl.store(student_margin + row, tl.where(counts, margin, 0.0))
        store_pair(normalizers + 2 * row, top_s, 1 / total_s)

    mass = 0.0
    best = float("-inf")
    divergence = 0.0
    ks = tl.arange(0, TEACHERS)
    shares = tl.zeros((TEACHERS,), tl.float32)
    totals = shares + 1
    into = into_s + STUDENT_CHUNK_PAIRS * plane
    for k in range(n_teachers):
        alpha = read_prior((prior, prior_stride_k, prior_stride_n), k, row, counts)
        tops, sums = load_pair(into, held)
        tops = tl.where(held, tops, float("-inf"))
        top = tl.max(tops, 0)
        f = (tops - top) * exponent
        e = tl.exp2(f)
        part = e * sums
        total = tl.sum(part, 0)
        kls, squares = load_pair(into + 2 * plane, held)
        kl = e * kls + part * (f - g)
        kl = tl.sum(tl.where(part > 0, kl, 0.0), 0) / total
        kl = divergence_of(kl, log_total_s, tl.log2(total))
        own, rest = join_margins(into + plane, held, tops, top, compared)
        margin = margin_of(own, rest, top, total, 1 / total, exponent, WEIGHTING)
        if weights is not None:
            means, sizes = load_pair(into + 3 * plane, held)
            means = tl.where(sizes > 0, means + (tops - top), 0.0)
            size = tl.maximum(tl.sum(sizes, 0), 1.0)
            apart = means - tl.sum(sizes * means, 0) / size
            scale = tl.sqrt(tl.sum(squares + sizes * apart * apart, 0) / size)
            tl.store(teacher_scale + k * n_rows + row, tl.where(alpha > 0, scale, 0.0))
            store_pair(normalizers + 2 * ((1 + k) * n_rows + row), top, 1 / total)
        into += TEACHER_CHUNK_PAIRS * plane

        share, keep, best, mass, divergence = admit(margin, alpha, kl, best, mass, divergence, sharpness, CHOICE)
        shares = shares * keep + tl.where(ks == k, share, 0.0)
        totals = tl.where(ks == k, total, totals)
        tl.store(factors + 2 * ((STUDENT_PAIRS + k) * n_rows + row), top)
        if weights is not None:
            tl.store(margins + k * n_rows + row, tl.where(alpha > 0, margin, 0.0))
            tl.store(kd + k * n_rows + row, tl.where(alpha > 0, kl, 0.0))

    inverse = tl.where(mass == 0, 0.0, 1 / mass)
    shares = tl.where(shares == 0, 0.0, shares * inverse)
    if weights is not None:
        tl.store(weights + ks * n_rows + row, shares, ks < n_teachers)

    loss = distillation_loss(divergence, inverse, kd_weight, temperature)
    alive = counts & (weight > 0)
    factor = tl.where(alive, gradient_factor(weight, invalid, divisor, n_rows, ignore_index), 0.0)
    if CE:
        s_labels, sums = load_pair(into_s + 2 * plane, held)
        s_label = tl.max(tl.where(held & labeled, s_labels, float("-inf")), 0)
        total = tl.sum(sums * tl.exp2(g * temperature), 0)
        sums, sizes = load_pair(into_s + 3 * plane, held)
        sums += sizes * g
        mean = tl.sum(tl.where(sizes > 0, sums, 0.0), 0) / n_classes
        at_label = temperature * (s_label - top_s) * exponent
        ce = cross_entropy(total, at_label, temperature * mean, label_smoothing)
        loss += tl.where(labeled, ce_weight * LN2 * ce, 0.0)
        ce_factor = tl.where(labeled, ce_weight * factor, 0.0)
        tl.store(factors + 2 * (n_rows + row), tl.where(ce_factor == 0, 0.0, (1 / total) * ce_factor))
        tl.store(factors + 2 * (n_rows + row) + 1, ce_factor)
    tl.store(row_loss + row, weighted_loss(loss, weight, alive, invalid))

    kd_factor = kd_weight * temperature * factor
    kd_factor = tl.where((mass == 0) & (invalid == 0), 0.0, kd_factor)
    tl.store(factors + 2 * row, top_s)
    # Student and teachers have the same order of operations: the gradient is exactly 0 where they are equal.
    tl.store(factors + 2 * row + 1, tl.where(kd_factor == 0, 0.0, (1 / total_s) * kd_factor))
    shares = tl.where(shares == 0, 0.0, tl.where(kd_factor == 0, 0.0, shares / totals * kd_factor))
    tl.store(factors + 2 * ((STUDENT_PAIRS + ks) * n_rows + row) + 1, shares, ks < n_teachers)


@kernel
def chunk_distances(
    student, t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15, teacher_table,
    scales, weights, normalizers, distances,
    row_stride: tl.int64, class_stride: tl.int64,
    teacher_stack: tl.int64, teacher_row_stride: tl.int64, teacher_class_stride: tl.int64, teacher_kinds: tl.int64,
    n_rows: tl.int64, n_classes: tl.int32, n_teachers: tl.int32, n_chunks: tl.int32, exponent: tl.float32,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr, GROUP: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """For the stats: sum |q - p| of each chunk and teacher, [K, N, chunks]."""
    teachers = (
        (t0, t1, t2, t3, t4, t5, t6, t7), (t8, t9, t10, t11, t12, t13, t14, t15),
        teacher_stack, teacher_row_stride, teacher_class_stride, teacher_kinds, teacher_table,
    )  # fmt: skip
    row = tl.program_id(0).to(tl.int64) // n_chunks
    chunk = tl.program_id(0) % n_chunks
    tile = place_tile(student, row, chunk, row_stride, n_rows, n_classes, GROUP, 1, CLASSES)
    top, inverse_s = load_pair(normalizers + 2 * row)
    source = (student.to(tl.int64), row_stride, class_stride, 0, top, top)
    # A row that is dropped has weights of 0.
    s, _ = load_tile(source, top == top, tile, n_classes, STUDENT, GROUP)
    b = (s - top) * exponent
    for k in range(n_teachers):
        taught = tl.load(weights + k * n_rows + row) != 0
        top, inverse = load_pair(normalizers + 2 * ((1 + k) * n_rows + row))
        source = find_teacher(k, teachers, scales, row, taught, n_rows, n_teachers)
        t, _ = load_tile(source, taught, tile, n_classes, TEACHER, GROUP)
        distance = distance_of(b, inverse_s, (t - top) * exponent, inverse)
        tl.store(distances + (k * n_rows + row) * n_chunks + chunk, tl.where(taught, distance, 0.0))


@kernel
def join_distances(
    distances, weights, pull, n_rows: tl.int64, n_teachers: tl.int32, n_chunks: tl.int32, CHUNKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, CHUNKS)
    for k in range(n_teachers):
        at = k * n_rows + row
        distance = tl.sum(tl.load(distances + at * n_chunks + chunks, chunks < n_chunks, other=0), 0)
        weight = tl.load(weights + at)
        tl.store(pull + at, tl.where(weight == 0, 0.0, weight * distance))


@kernel
def chunk_gradient(
    student, t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15, teacher_table,
    scales, labels, factors, grad,
    row_stride: tl.int64, class_stride: tl.int64,
    teacher_stack: tl.int64, teacher_row_stride: tl.int64, teacher_class_stride: tl.int64, teacher_kinds: tl.int64,
    n_rows: tl.int64, n_classes: tl.int32, n_teachers: tl.int32, n_chunks: tl.int32,
    exponent: tl.float32, temperature: tl.float32, label_smoothing: tl.float32,
    CE: tl.constexpr, STUDENT: tl.constexpr, TEACHER: tl.constexpr,
    GROUP: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    teachers = (
        (t0, t1, t2, t3, t4, t5, t6, t7), (t8, t9, t10, t11, t12, t13, t14, t15),
        teacher_stack, teacher_row_stride, teacher_class_stride, teacher_kinds, teacher_table,
    )  # fmt: skip
    row = tl.program_id(0).to(tl.int64) // n_chunks
    chunk = tl.program_id(0) % n_chunks
    tile = place_tile(student, row, chunk, row_stride, n_rows, n_classes, GROUP, 1, CLASSES)
    top, kd_factor = load_pair(factors + 2 * row)
    wanted = kd_factor != 0
    if CE:
        q_factor, ce_factor = load_pair(factors + 2 * (n_rows + row))
        wanted |= ce_factor != 0
    source = (student.to(tl.int64), row_stride, class_stride, 0, top, top)
    s, start = load_tile(source, wanted, tile, n_classes, STUDENT, GROUP)
    b = (s - top) * exponent
    g = tl.where(kd_factor == 0, 0.0, tl.exp2(b) * kd_factor)
    for k in range(n_teachers):
        top, factor = load_pair(factors + 2 * ((STUDENT_PAIRS + k) * n_rows + row))
        source = find_teacher(k, teachers, scales, row, factor != 0, n_rows, n_teachers)
        t, start = load_tile(source, factor != 0, tile, n_classes, TEACHER, GROUP)
        e = tl.exp2((t - top) * exponent) * factor
        g -= tl.where(factor == 0, 0.0, e)
    if CE:
        label = tl.load(labels + row).to(tl.int32)
        g_ce = cross_entropy_gradient(
            b, columns_of(s, start), label, q_factor, ce_factor, temperature, label_smoothing, n_classes
        )
        g += tl.where(ce_factor == 0, 0.0, g_ce)
    store_tile(grad, g, tile, n_classes, GROUP)
