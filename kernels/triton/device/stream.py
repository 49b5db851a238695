"""Rows of any length: statistics of chunks, their union per row, and one gradient pass over the same chunks.

Each program has one chunk of a row, so that few long rows keep a device as busy as many do. Each logit is read once for
the loss and once for the gradient. Between the two passes, memory holds a few numbers per chunk and teacher, each
relative to the largest logit of its chunk. What needs the normalizers of whole rows takes a pass in between: the stats,
and all divergences but the forward and the reverse KL.
"""

import triton
import triton.language as tl
from amtss_fast._compat.triton import jit_without_specialization as kernel

from .divergences import compare
from .inputs import load_teacher, read_exponent, read_prior, read_row_inputs
from .lists import COMPARED, find_list, listed_bits, rest_logits, unless_listed
from .loss import (
    cross_entropy,
    cross_entropy_gradient,
    distillation_loss,
    divergence_of,
    gradient_factor,
    weighted_loss,
)
from .margins import LN2, admit, margin_label, margin_of, spread_of, stand_out
from .memory import columns_of, load_tile, place_tile, store_tile
from .pairs import STUDENT_CHUNK_PAIRS, STUDENT_PAIRS, TEACHER_CHUNK_PAIRS, load_pair, store_pair


@kernel
def chunk_statistics(
    student, t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15, teacher_table,
    scales, exponents, places, labels, prior, lists, list_classes, fields, student_margin,
    row_stride: tl.int64, class_stride: tl.int64,
    teacher_stack: tl.int64, teacher_row_stride: tl.int64, teacher_class_stride: tl.int64, teacher_kinds: tl.int64,
    prior_stride_k: tl.int64, prior_stride_n: tl.int64,
    n_rows: tl.int64, n_classes: tl.int32, n_teachers: tl.int32, n_chunks: tl.int32,
    ignore_index: tl.int64, unlabeled_index: tl.int64, exponent: tl.float32, temperature: tl.float32,
    WEIGHTING: tl.constexpr, DIVERGENCE: tl.constexpr, CE: tl.constexpr,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr, GROUP: tl.constexpr, CLASSES: tl.constexpr, LIST: tl.constexpr,
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
        alpha = read_prior((prior, prior_stride_k, prior_stride_n, places), k, row, counts, n_rows)
        exponent_t = read_exponent(exponents, k, exponent)
        wanted = alpha > 0
        if lists is not None:
            number, begin = find_list(k, row, lists, places, n_rows, LIST)
            wanted = unless_listed(wanted, number)
        t, start = load_teacher(
            k, teachers, scales, places, tile, counts, wanted, n_rows, n_classes, n_teachers, TEACHER, GROUP
        )
        if lists is not None:
            t = rest_logits(number, t, s, start, list_classes + begin, n_classes, LIST)
            exponent_t = tl.where(number >= 0, exponent, exponent_t)
        top, own, rest = stand_out(t, start, compared)
        a = (t - tl.where(top == float("-inf"), 0.0, top)) * exponent_t
        e = tl.exp2(a)
        store_pair(out, top, tl.sum(e, 0))
        store_pair(out + plane, own, rest)
        kl = 0.0 * alpha
        if DIVERGENCE == "forward_kl":
            kl = relative_sum(e, a, b)
        elif DIVERGENCE == "reverse_kl":
            kl = relative_sum(tl.exp2(b), b, a)
        if student_margin is not None:
            count, mean, squares = spread_of(t, top)
            store_pair(out + 2 * plane, kl, squares)
            store_pair(out + 3 * plane, mean, count)
        else:
            store_pair(out + 2 * plane, kl, 0.0 * alpha)
        out += TEACHER_CHUNK_PAIRS * plane


@triton.jit
def relative_sum(e, x, y):
    """The sum of e (x - y) with e = exp2(x): 0 log 0 is 0, also where both are -inf."""
    return tl.sum(tl.where(e > 0, e * (x - y), 0.0), 0)


@triton.jit
def join_relative_sums(totals, into, held, x, y):
    """:func:`relative_sum` of a row from its chunks, relative to the largest logits of the row.

    `totals`: sum e of each chunk; `x` and `y`: the largest logits of the chunks less those of the row.
    """
    sums, squares = load_pair(into, held)
    e = tl.exp2(x)
    part = e * totals
    return tl.sum(tl.where(part > 0, e * sums + part * (x - y), 0.0), 0), squares


@kernel
def join_normalizers(
    fields, normalizers, exponents, n_rows: tl.int64, n_teachers: tl.int32, n_chunks: tl.int32, exponent: tl.float32,
    CHUNKS: tl.constexpr,
):  # fmt: skip
    """The maximum and 1 / the sum of exponentials of each row of the student and of the teachers, [1 + K, N, 2]."""
    row = tl.program_id(0).to(tl.int64) // (1 + n_teachers)
    k = tl.program_id(0) % (1 + n_teachers) - 1
    pair = 0
    if k >= 0:
        exponent = read_exponent(exponents, k, exponent)
        pair = STUDENT_CHUNK_PAIRS + k * TEACHER_CHUNK_PAIRS
    chunks = tl.arange(0, CHUNKS)
    held = chunks < n_chunks
    tops, sums = load_pair(fields + 2 * ((pair * n_rows + row) * n_chunks + chunks), held)
    tops = tl.where(held, tops, float("-inf"))
    top = tl.max(tops, 0)
    total = tl.sum(sums * tl.exp2((tops - top) * exponent), 0)
    store_pair(normalizers + 2 * ((1 + k) * n_rows + row), top, 1 / total)


@kernel
def chunk_divergences(
    student, t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15, teacher_table,
    scales, exponents, places, labels, prior, lists, normalizers, sums, distances,
    row_stride: tl.int64, class_stride: tl.int64,
    teacher_stack: tl.int64, teacher_row_stride: tl.int64, teacher_class_stride: tl.int64, teacher_kinds: tl.int64,
    prior_stride_k: tl.int64, prior_stride_n: tl.int64,
    n_rows: tl.int64, n_classes: tl.int32, n_teachers: tl.int32, n_chunks: tl.int32,
    ignore_index: tl.int64, unlabeled_index: tl.int64,
    exponent: tl.float32, mixing: tl.float32, unmixing: tl.float32,
    DIVERGENCE: tl.constexpr, STUDENT: tl.constexpr, TEACHER: tl.constexpr, GROUP: tl.constexpr, CLASSES: tl.constexpr,
    LIST: tl.constexpr,
):  # fmt: skip
    """The sums of the terms of D and of its slopes, pairs [K, N, chunks, 2]; for the stats sum |q - p|, [K, N, chunks].

    Either may be None. Those of a teacher with a list have no meaning.
    """
    teachers = (
        (t0, t1, t2, t3, t4, t5, t6, t7), (t8, t9, t10, t11, t12, t13, t14, t15),
        teacher_stack, teacher_row_stride, teacher_class_stride, teacher_kinds, teacher_table,
    )  # fmt: skip
    row = tl.program_id(0).to(tl.int64) // n_chunks
    chunk = tl.program_id(0) % n_chunks
    tile = place_tile(student, row, chunk, row_stride, n_rows, n_classes, GROUP, 1, CLASSES)
    counts, _, _, _ = read_row_inputs(labels, None, row, n_rows, n_classes, ignore_index, unlabeled_index)
    top, inverse_s = load_pair(normalizers + 2 * row)
    source = (student.to(tl.int64), row_stride, class_stride, 0, top, top)
    s, _ = load_tile(source, counts, tile, n_classes, STUDENT, GROUP)
    b = (s - top) * exponent
    for k in range(n_teachers):
        alpha = read_prior((prior, prior_stride_k, prior_stride_n, places), k, row, counts, n_rows)
        wanted = alpha > 0
        if lists is not None:
            number, _ = find_list(k, row, lists, places, n_rows, LIST)
            wanted = unless_listed(wanted, number)
        top, inverse = load_pair(normalizers + 2 * ((1 + k) * n_rows + row))
        t, _ = load_teacher(
            k, teachers, scales, places, tile, counts, wanted, n_rows, n_classes, n_teachers, TEACHER, GROUP
        )
        a = (t - top) * read_exponent(exponents, k, exponent)
        p = tl.exp2(a) * inverse
        q = tl.exp2(b) * inverse_s
        at = (k * n_rows + row) * n_chunks + chunk
        if sums is not None:
            log_ratio = tl.log2(inverse) - tl.log2(inverse_s)
            term, slope = compare(a, b, p, q, log_ratio, mixing, unmixing, DIVERGENCE)
            store_pair(sums + 2 * at, tl.sum(term, 0), tl.sum(slope, 0))
        if distances is not None:
            tl.store(distances + at, tl.sum(tl.abs(q - p), 0))


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
    labels, prior, exponents, places, sample_weight, divisor, lists, compared, fields, sums, distances, factors,
    row_loss, weights, margins, kd, student_margin, teacher_scale, pull,
    prior_stride_k: tl.int64, prior_stride_n: tl.int64,
    n_rows: tl.int64, n_classes: tl.int32, n_teachers: tl.int32, n_chunks: tl.int32,
    ignore_index: tl.int64, unlabeled_index: tl.int64,
    exponent: tl.float32, temperature: tl.float32, sharpness: tl.float32,
    kd_weight: tl.float32, ce_weight: tl.float32, label_smoothing: tl.float32,
    WEIGHTING: tl.constexpr, CHOICE: tl.constexpr, DIVERGENCE: tl.constexpr, CE: tl.constexpr,
    CHUNKS: tl.constexpr, TEACHERS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    counts, target, invalid, weight = read_row_inputs(
        labels, sample_weight, row, n_rows, n_classes, ignore_index, unlabeled_index
    )
    labeled = target >= 0
    margin_class = margin_label(target, WEIGHTING)
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
        own, rest = join_margins(into_s + plane, held, tops, top_s, margin_class)
        margin = margin_of(own, rest, top_s, total_s, 1 / total_s, exponent, WEIGHTING)
        tl.store(student_margin + row, tl.where(counts, margin, 0.0))

    mass = 0.0
    best = float("-inf")
    divergence = 0.0
    ks = tl.arange(0, TEACHERS)
    shares = tl.zeros((TEACHERS,), tl.float32)
    totals = shares + 1
    slopes = shares
    apart = shares
    into = into_s + STUDENT_CHUNK_PAIRS * plane
    for k in range(n_teachers):
        alpha = read_prior((prior, prior_stride_k, prior_stride_n, places), k, row, counts, n_rows)
        exponent_t = read_exponent(exponents, k, exponent)
        tops, totals_t = load_pair(into, held)
        tops = tl.where(held, tops, float("-inf"))
        top = tl.max(tops, 0)
        f = (tops - top) * exponent_t
        total = tl.sum(totals_t * tl.exp2(f), 0)
        at = (k * n_rows + row) * n_chunks + chunks
        if DIVERGENCE == "forward_kl":
            kl, squares = join_relative_sums(totals_t, into + 2 * plane, held, f, g)
            kl = divergence_of(kl / total, log_total_s, tl.log2(total))
        elif DIVERGENCE == "reverse_kl":
            kl, squares = join_relative_sums(totals_s, into + 2 * plane, held, g, f)
            kl = divergence_of(kl / total_s, tl.log2(total), log_total_s)
            slopes = tl.where(ks == k, kl, slopes)
        else:
            kls, squares = load_pair(into + 2 * plane, held)
            kls, tilts = load_pair(sums + 2 * at, held)
            kl = tl.sum(kls, 0)
            slopes = tl.where(ks == k, tl.sum(tilts, 0), slopes)
        own, rest = join_margins(into + plane, held, tops, top, margin_class)
        margin = margin_of(own, rest, top, total, 1 / total, exponent_t, WEIGHTING)
        if lists is not None:
            listed = tl.load(lists + k).to(tl.int32) >= 0
            found = compared + COMPARED * (k * n_rows + row)
            kl = tl.where(listed, tl.load(found), kl)
            slopes = tl.where(listed & (ks == k), tl.load(found + 1), slopes)
            margin = tl.where(listed, tl.load(found + 2), margin)
            # Its probabilities need no division.
            total = tl.where(listed, 1.0, total)
        if weights is not None:
            means, sizes = load_pair(into + 3 * plane, held)
            means = tl.where(sizes > 0, means + (tops - top), 0.0)
            size = tl.maximum(tl.sum(sizes, 0), 1.0)
            means -= tl.sum(sizes * means, 0) / size
            scale = tl.sqrt(tl.sum(squares + sizes * means * means, 0) / size)
            if lists is not None:
                scale = tl.where(listed, tl.load(found + 3), scale)
            tl.store(teacher_scale + k * n_rows + row, tl.where(alpha > 0, scale, 0.0))
            distance = tl.sum(tl.load(distances + at, held, other=0), 0)
            if lists is not None:
                distance = tl.where(listed, tl.load(found + 4), distance)
            apart = tl.where(ks == k, distance, apart)
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
        tl.store(pull + ks * n_rows + row, tl.where(shares == 0, 0.0, shares * apart), ks < n_teachers)

    loss = distillation_loss(divergence, inverse, kd_weight, temperature)
    alive = counts & (weight > 0)
    factor = tl.where(alive, gradient_factor(weight, invalid, divisor, n_rows, ignore_index), 0.0)
    if CE:
        s_labels, totals_ce = load_pair(into_s + 2 * plane, held)
        s_label = tl.max(tl.where(held & labeled, s_labels, float("-inf")), 0)
        total = tl.sum(totals_ce * tl.exp2(g * temperature), 0)
        logits, sizes = load_pair(into_s + 3 * plane, held)
        logits += sizes * g
        mean = tl.sum(tl.where(sizes > 0, logits, 0.0), 0) / n_classes
        at_label = temperature * (s_label - top_s) * exponent
        ce = cross_entropy(total, at_label, temperature * mean, label_smoothing)
        loss += tl.where(labeled, ce_weight * LN2 * ce, 0.0)
        ce_factor = tl.where(labeled, ce_weight * factor, 0.0)
        tl.store(factors + 2 * (n_rows + row), tl.where(ce_factor == 0, 0.0, (1 / total) * ce_factor))
        tl.store(factors + 2 * (n_rows + row) + 1, ce_factor)
    tl.store(row_loss + row, weighted_loss(loss, weight, alive, invalid))

    kd_factor = kd_weight * temperature * factor
    kd_factor = tl.where((mass == 0) & (invalid == 0), 0.0, kd_factor)
    if DIVERGENCE == "forward_kl":
        tl.store(factors + 2 * row, top_s)
        # Student and teachers have the same order of operations: the gradient is exactly 0 where they are equal.
        tl.store(factors + 2 * row + 1, tl.where(kd_factor == 0, 0.0, (1 / total_s) * kd_factor))
        shares = tl.where(shares == 0, 0.0, shares / totals)
    else:
        slope = tl.sum(tl.where(shares == 0, 0.0, shares * slopes), 0)
        tl.store(factors + 2 * row, tl.where(kd_factor == 0, 0.0, slope * kd_factor))
        tl.store(factors + 2 * row + 1, kd_factor)
    # A factor of 0 stands for no teacher, also where the row is NaN.
    shares = tl.where(shares == 0, 0.0, tl.where(kd_factor == 0, 0.0, shares * kd_factor))
    tl.store(factors + 2 * ((STUDENT_PAIRS + ks) * n_rows + row) + 1, shares, ks < n_teachers)


@kernel
def chunk_gradient(
    student, t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15, teacher_table,
    scales, exponents, places, labels, lists, list_classes, list_bits, normalizers, factors, grad,
    row_stride: tl.int64, class_stride: tl.int64,
    teacher_stack: tl.int64, teacher_row_stride: tl.int64, teacher_class_stride: tl.int64, teacher_kinds: tl.int64,
    n_rows: tl.int64, n_classes: tl.int32, n_teachers: tl.int32, n_chunks: tl.int32,
    exponent: tl.float32, temperature: tl.float32, mixing: tl.float32, unmixing: tl.float32,
    label_smoothing: tl.float32, DIVERGENCE: tl.constexpr, CE: tl.constexpr,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr, GROUP: tl.constexpr, CLASSES: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    teachers = (
        (t0, t1, t2, t3, t4, t5, t6, t7), (t8, t9, t10, t11, t12, t13, t14, t15),
        teacher_stack, teacher_row_stride, teacher_class_stride, teacher_kinds, teacher_table,
    )  # fmt: skip
    row = tl.program_id(0).to(tl.int64) // n_chunks
    chunk = tl.program_id(0) % n_chunks
    tile = place_tile(student, row, chunk, row_stride, n_rows, n_classes, GROUP, 1, CLASSES)
    top, kd_factor = load_pair(factors + 2 * row)
    if DIVERGENCE != "forward_kl":
        slope_factor = top
        top, inverse_s = load_pair(normalizers + 2 * row)
    wanted = kd_factor != 0
    if CE:
        q_factor, ce_factor = load_pair(factors + 2 * (n_rows + row))
        wanted |= ce_factor != 0
    source = (student.to(tl.int64), row_stride, class_stride, 0, top, top)
    s, start = load_tile(source, wanted, tile, n_classes, STUDENT, GROUP)
    b = (s - top) * exponent
    if DIVERGENCE == "forward_kl":
        g = tl.where(kd_factor == 0, 0.0, tl.exp2(b) * kd_factor)
    else:
        g = tl.where(kd_factor == 0, 0.0, -tl.exp2(b) * inverse_s * slope_factor)
    for k in range(n_teachers):
        top, factor = load_pair(factors + 2 * ((STUDENT_PAIRS + k) * n_rows + row))
        taught = factor != 0
        wanted = taught
        if lists is not None:
            number, begin = find_list(k, row, lists, places, n_rows, LIST)
            wanted = unless_listed(taught, number)
        t, start = load_teacher(
            k, teachers, scales, places, tile, taught, wanted, n_rows, n_classes, n_teachers, TEACHER, GROUP
        )
        exponent_t = read_exponent(exponents, k, exponent)
        if DIVERGENCE != "forward_kl":
            top, inverse = load_pair(normalizers + 2 * ((1 + k) * n_rows + row))
        a = (t - top) * exponent_t
        if lists is not None:
            shift = normalizers + 2 * ((1 + k) * n_rows + row)
            a = listed_bits(
                number, a, s, start, shift, exponent, list_classes + begin, list_bits + begin, n_classes, LIST
            )
            if DIVERGENCE != "forward_kl":
                inverse = tl.where(number >= 0, 1.0, inverse)
        if DIVERGENCE == "forward_kl":
            e = tl.exp2(a) * factor
            g -= tl.where(factor == 0, 0.0, e)
        else:
            log_ratio = tl.log2(inverse) - tl.log2(inverse_s)
            p = tl.exp2(a) * inverse
            q = tl.exp2(b) * inverse_s
            _, slope = compare(a, b, p, q, log_ratio, mixing, unmixing, DIVERGENCE)
            g += tl.where(factor == 0, 0.0, slope * factor)
    if CE:
        label = tl.load(labels + row).to(tl.int32)
        g_ce = cross_entropy_gradient(
            b, columns_of(s, start), label, q_factor, ce_factor, temperature, label_smoothing, n_classes
        )
        g += tl.where(ce_factor == 0, 0.0, g_ce)
    store_tile(grad, g, tile, n_classes, GROUP)
