"""Rows that fit on chip: each logit is loaded once, and one launch gives loss, gradient and statistics.

A program holds ROWS rows of the student and of one teacher at a time. It keeps the mixture of the teachers'
probabilities (of their slopes, see `divergences.py`, if the divergence is not the forward KL) in registers during the
softmax over the teachers. With few classes a tile has many rows; with up to some thousand classes it has one.
"""

import triton.language as tl
from amtss_fast._compat.triton import jit_without_specialization as kernel

from .bits import in_bits, relative_sum
from .divergences import compare
from .inputs import load_teacher, read_exponent, read_prior, read_row_inputs
from .loss import (
    cross_entropy,
    cross_entropy_gradient,
    distillation_loss,
    divergence_of,
    gradient_factor,
    weighted_loss,
)
from .margins import LN2, admit, distance_of, margin_label, margin_of, spread_of, stand_out
from .memory import across, columns_of, load_tile, place_tile, store_tile


@kernel
def fused_tile(
    student, t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15, teacher_table,
    scales, exponents, places, labels, prior, sample_weight, divisor,
    row_loss, grad, weights, margins, kd, student_margin, teacher_scale, pull,
    row_stride: tl.int64, class_stride: tl.int64,
    teacher_stack: tl.int64, teacher_row_stride: tl.int64, teacher_class_stride: tl.int64, teacher_kinds: tl.int64,
    prior_stride_k: tl.int64, prior_stride_n: tl.int64,
    n_rows: tl.int64, n_classes: tl.int32, n_teachers: tl.int32, ignore_index: tl.int64, unlabeled_index: tl.int64,
    exponent: tl.float32, temperature: tl.float32, sharpness: tl.float32,
    mixing: tl.float32, unmixing: tl.float32, kd_weight: tl.float32, ce_weight: tl.float32, label_smoothing: tl.float32,
    WEIGHTING: tl.constexpr, CHOICE: tl.constexpr, DIVERGENCE: tl.constexpr, CE: tl.constexpr,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, CLASSES: tl.constexpr, TEACHERS: tl.constexpr,
):  # fmt: skip
    teachers = (
        (t0, t1, t2, t3, t4, t5, t6, t7), (t8, t9, t10, t11, t12, t13, t14, t15),
        teacher_stack, teacher_row_stride, teacher_class_stride, teacher_kinds, teacher_table,
    )  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * ROWS
    tile = place_tile(student, first, 0, row_stride, n_rows, n_classes, GROUP, ROWS, CLASSES)
    _, _, rows, _, _, _ = tile
    counts, target, invalid, weight = read_row_inputs(
        labels, sample_weight, rows, n_rows, n_classes, ignore_index, unlabeled_index
    )
    compared = margin_label(target, WEIGHTING)

    source = (student.to(tl.int64), row_stride, class_stride, 0, weight, weight)
    s, start = load_tile(source, counts, tile, n_classes, STUDENT, GROUP, "")
    start_s = start
    if student_margin is not None:
        top, own, rest = stand_out(s, start, compared)
    else:
        top = tl.max(s, 0)
    b = in_bits(s, top, exponent)
    has_holes = True
    if ROWS == 1 and DIVERGENCE == "forward_kl":
        has_holes = tl.min(s, 0) == float("-inf")
    total_s = tl.sum(tl.exp2(b), 0)
    if student_margin is not None:
        margin = margin_of(own, rest, top, total_s, 1 / total_s, exponent, WEIGHTING)
        tl.store(student_margin + rows, tl.where(counts, margin, 0.0), rows < n_rows)

    mass = (rows * 0).to(tl.float32)
    best = mass - float("inf")
    divergence = mass
    mixture = tl.zeros(s.shape, tl.float32)
    ks = tl.arange(0, TEACHERS) if ROWS == 1 else tl.arange(0, TEACHERS)[:, None]
    shares = tl.zeros(ks.shape, tl.float32) * across(mass)
    distances = shares
    for k in range(n_teachers):
        alpha = read_prior((prior, prior_stride_k, prior_stride_n, places), k, rows, counts, n_rows)
        t, start = load_teacher(
            k, teachers, scales, places, tile, counts, alpha > 0, n_rows, n_classes, n_teachers, TEACHER, GROUP, ""
        )
        exponent_t = read_exponent(exponents, k, exponent)
        top_t, own, rest = stand_out(t, start, compared)
        a = in_bits(t, top_t, exponent_t)
        e = tl.exp2(a)
        total = tl.sum(e, 0)
        part = 1 / total
        if DIVERGENCE == "forward_kl":
            kl = divergence_of(relative_sum(e, a, b, has_holes) * part, total_s, total)
        else:
            p = e * across(part)
            q = tl.exp2(b) * across(1 / total_s)
            log_ratio = across(tl.log2(total_s / total))
            term, slope = compare(a, b, p, q, log_ratio, mixing, unmixing, DIVERGENCE)
            kl = tl.sum(term, 0)
        margin = margin_of(own, rest, top_t, total, part, exponent_t, WEIGHTING)

        share, keep, best, mass, divergence = admit(margin, alpha, kl, best, mass, divergence, sharpness, CHOICE)
        if DIVERGENCE == "forward_kl":
            # That of the teachers' probabilities; their slopes are its negative.
            slope = e
            factor = share * part
        else:
            factor = share
        if ROWS > 1:
            mixture = mixture * across(keep) + tl.where(across(share == 0), 0.0, slope * across(factor))
        else:
            if keep != 1:
                mixture *= keep
            if share != 0:
                mixture = tl.fma(slope, tl.zeros(e.shape, tl.float32) + factor, mixture)
        if weights is not None:
            shares = shares * across(keep) + tl.where(ks == k, across(share), 0.0)
            tl.store(margins + k * n_rows + rows, tl.where(alpha > 0, margin, 0.0), rows < n_rows)
            tl.store(kd + k * n_rows + rows, tl.where(alpha > 0, kl, 0.0), rows < n_rows)
            count, _mean, squares = spread_of(t, top_t)
            scale = tl.sqrt(squares / tl.maximum(count, 1.0))
            tl.store(teacher_scale + k * n_rows + rows, tl.where(alpha > 0, scale, 0.0), rows < n_rows)
            distances = tl.where(ks == k, across(distance_of(b, 1 / total_s, a, part)), distances)

    inverse = tl.where(mass == 0, 0.0, 1 / mass)
    if weights is not None:
        held = across(rows < n_rows) & (ks < n_teachers)
        shares = tl.where(shares == 0, 0.0, shares * across(inverse))
        tl.store(weights + ks * n_rows + across(rows), shares, held)
        tl.store(pull + ks * n_rows + across(rows), tl.where(shares == 0, 0.0, shares * distances), held)

    loss = distillation_loss(divergence, inverse, kd_weight, temperature)
    # All loads return the same start, which the compiler cannot see. So it computes the columns and exp2(b) here
    # instead of holding them in registers through the loop. Without this, the loss alone of float32 tiles of 1 x 4096
    # spills 40 bytes on sm_90, and that of 1 x 8192 takes 225 registers in place of 209.
    columns = columns_of(b, start)
    b += (start - start_s).to(tl.float32)
    labeled = target >= 0
    if CE:
        total = tl.sum(tl.exp2(b * temperature), 0)
        ce_inverse = ce_weight / total
        # `total` is never negative, which the compiler cannot see either. So it computes exp2(b temperature) again.
        # Without this, float32 tiles of 1 x 512 with all outputs take 127 registers in place of 120 on sm_80.
        b += across(tl.where(total < 0, total, 0.0))
        own = tl.max(tl.where(columns == across(target), b, float("-inf")), 0)
        inside = (columns >= 0) & (columns < n_classes) & across(rows < n_rows)
        mean = tl.sum(tl.where(inside, b, 0.0), 0) / n_classes
        ce = cross_entropy(total, temperature * own, temperature * mean, label_smoothing)
        loss += tl.where(labeled, ce_weight * LN2 * ce, 0.0)

    alive = counts & (weight > 0)
    tl.store(row_loss + rows, weighted_loss(loss, weight, alive, invalid), rows < n_rows)

    if grad is not None:
        factor = gradient_factor(weight, invalid, divisor, n_rows, ignore_index)
        taught = (mass != 0) & (kd_weight > 0)
        kd_factor = across(kd_weight * temperature * factor)
        # Student and teachers have the same order of operations: 0 where they are equal.
        if DIVERGENCE == "forward_kl":
            g_kd = tl.exp2(b) * across(1 / total_s) * kd_factor - mixture * across(inverse) * kd_factor
        else:
            mixture *= across(inverse)
            g_kd = (mixture - tl.exp2(b) * across(1 / total_s) * across(tl.sum(mixture, 0))) * kd_factor
        g = tl.where(across(taught), g_kd, 0.0)
        if CE:
            g_ce = cross_entropy_gradient(
                b, columns, across(target), across(ce_inverse), ce_weight, temperature, label_smoothing, n_classes
            )
            g += tl.where(across(labeled), g_ce * across(factor), 0.0)
        g = tl.where(across(alive), g, 0.0)
        store_tile(grad, g, tile, n_classes, GROUP, "")
