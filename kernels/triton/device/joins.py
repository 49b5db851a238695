"""What a program does with the chunks of a whole row: it joins what each of them found."""

import triton
import triton.language as tl

from .bits import in_bits, references_apart
from .inputs import read_exponent, read_prior, read_row_inputs
from .lists import COMPARED
from .loss import cross_entropy, distillation_loss, divergence_of, gradient_factor, weighted_loss
from .margins import LN2, admit, margin_label, margin_of
from .memory import find_shift
from .pairs import STUDENT_CHUNK_PAIRS, STUDENT_PAIRS, TEACHER_CHUNK_PAIRS, load_pair, store_pair


@triton.jit
def join_normalizers(k, row, between, exponents, sizes, numbers, CHUNKS: tl.constexpr):
    """The maximum and 1 / the sum of exponentials of a row of teacher k, of the student if k = -1; [1 + K, N, 2]."""
    fields, normalizers, _, _, _, _ = between
    n_rows, _, _, n_chunks = sizes
    exponent, _, _, _, _, _, _, _ = numbers
    pair = 0
    if k >= 0:
        exponent = read_exponent(exponents, k, exponent)
        pair = STUDENT_CHUNK_PAIRS + k * TEACHER_CHUNK_PAIRS
    chunks = tl.arange(0, CHUNKS)
    held = chunks < n_chunks
    tops, sums = load_pair(fields + 2 * ((pair * n_rows + row) * n_chunks + chunks), held)
    tops = tl.where(held, tops, float("-inf"))
    top = tl.max(tops, 0)
    total = tl.sum(sums * tl.exp2(references_apart(tops, top, exponent)), 0)
    store_pair(normalizers + 2 * ((1 + k) * n_rows + row), top, 1 / total)


@triton.jit
def join_relative_sums(totals, into, held, x, y):
    """:func:`chunks.relative_sum` of a row from its chunks, relative to the largest logits of the row.

    `totals`: sum e of each chunk; `x` and `y`: the largest logits of the chunks less those of the row.
    """
    sums, squares = load_pair(into, held)
    e = tl.exp2(x)
    part = e * totals
    return tl.sum(tl.where(part > 0, e * sums + part * (x - y), 0.0), 0), squares


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


@triton.jit
def join_row(
    row, logits, rows, list_numbers, divisor, between, outputs, sizes, numbers,
    WEIGHTING: tl.constexpr, CHOICE: tl.constexpr, DIVERGENCE: tl.constexpr, CE: tl.constexpr,
    GROUP: tl.constexpr, CLASSES: tl.constexpr, CHUNKS: tl.constexpr, TEACHERS: tl.constexpr,
):  # fmt: skip
    """The loss of a row, its stats, and the factors of its gradient."""
    student, row_stride, class_stride, _, _, exponents, _ = logits
    labels, sample_weight, prior, ignore_index, unlabeled_index = rows
    fields, _, sums, distances, compared, factors = between
    row_loss, weights, margins, kd, student_margin, teacher_scale, pull = outputs
    n_rows, n_classes, n_teachers, n_chunks = sizes
    exponent, temperature, sharpness, _, _, kd_weight, ce_weight, label_smoothing = numbers
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
    g = references_apart(tops, top_s, exponent)
    total_s = tl.sum(totals_s * tl.exp2(g), 0)
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
        alpha = read_prior(prior, k, row, counts, n_rows)
        exponent_t = read_exponent(exponents, k, exponent)
        tops, totals_t = load_pair(into, held)
        tops = tl.where(held, tops, float("-inf"))
        top = tl.max(tops, 0)
        f = references_apart(tops, top, exponent_t)
        total = tl.sum(totals_t * tl.exp2(f), 0)
        at = (k * n_rows + row) * n_chunks + chunks
        if DIVERGENCE == "forward_kl":
            kl, squares = join_relative_sums(totals_t, into + 2 * plane, held, f, g)
            kl = divergence_of(kl / total, total_s, total)
        elif DIVERGENCE == "reverse_kl":
            kl, squares = join_relative_sums(totals_s, into + 2 * plane, held, g, f)
            kl = divergence_of(kl / total_s, total, total_s)
            slopes = tl.where(ks == k, kl, slopes)
        else:
            kls, squares = load_pair(into + 2 * plane, held)
            kls, tilts = load_pair(sums + 2 * at, held)
            kl = tl.sum(kls, 0)
            slopes = tl.where(ks == k, tl.sum(tilts, 0), slopes)
        own, rest = join_margins(into + plane, held, tops, top, margin_class)
        margin = margin_of(own, rest, top, total, 1 / total, exponent_t, WEIGHTING)
        if list_numbers is not None:
            listed = tl.load(list_numbers + k).to(tl.int32) >= 0
            found = compared + COMPARED * (k * n_rows + row)
            kl = tl.where(listed, tl.load(found), kl)
            slopes = tl.where(listed & (ks == k), tl.load(found + 1), slopes)
            margin = tl.where(listed, tl.load(found + 2), margin)
            # Its probabilities need no division.
            total = tl.where(listed, 1.0, total)
        if weights is not None:
            means, amounts = load_pair(into + 3 * plane, held)
            means = tl.where(amounts > 0, means + (tops - top), 0.0)
            amount = tl.maximum(tl.sum(amounts, 0), 1.0)
            means -= tl.sum(amounts * means, 0) / amount
            scale = tl.sqrt(tl.sum(squares + amounts * means * means, 0) / amount)
            if list_numbers is not None:
                scale = tl.where(listed, tl.load(found + 3), scale)
            tl.store(teacher_scale + k * n_rows + row, tl.where(alpha > 0, scale, 0.0))
            distance = tl.sum(tl.load(distances + at, held, other=0), 0)
            if list_numbers is not None:
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
        totals_ce, bits = load_pair(into_s + 2 * plane, held)
        total = tl.sum(totals_ce * tl.exp2(g * temperature), 0)
        begins = chunks * CLASSES
        if GROUP > 1:
            begins -= find_shift(student + row * row_stride, GROUP)
        amounts = tl.minimum(begins + CLASSES, n_classes) - tl.maximum(begins, 0)
        mean = tl.sum(tl.where(held & (amounts > 0), bits + amounts * g, 0.0), 0) / n_classes
        at_label = tl.load(student + row * row_stride + target.to(tl.int64) * class_stride, labeled, other=0)
        at_label = temperature * in_bits(at_label.to(tl.float32), top_s, exponent)
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
