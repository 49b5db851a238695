"""Rows of any length, divided into chunks: one program each, so that few long rows keep a device as busy as many do.

A row takes two steps, or three with the stats and with all divergences but the forward and the reverse KL:

1. statistics of its chunks, each relative to the largest logit of the chunk; the last joins them to the normalizers;
2. where these are needed first: the terms of the divergence, which the last joins;
3. the gradient.

With one read (STEP "all"), programs take tickets in the order in which they start. The steps take turns, and each is
`lag` rows behind the one before: near enough to find its logits in the second-level cache, far enough not to wait.
Programs wait for such with lower tickets alone, which run or have ended. So nothing needs to be resident together, and
programs that run one after the other never wait. With two reads, each step is a launch of its own ("chunks"), and so is
what the last program of a row does ("rows").
"""

import triton
import triton.language as tl
from amtss_fast._compat.triton import jit_without_specialization as kernel

from .chunks import compare_chunk, take_statistics, write_gradient
from .joins import join_normalizers, join_row
from .lists import compare_list


@triton.jit
def settle(
    step, row, logits, rows, lists, divisor, between, outputs, sizes, numbers,
    LAST: tl.constexpr, WEIGHTING: tl.constexpr, CHOICE: tl.constexpr, DIVERGENCE: tl.constexpr, CE: tl.constexpr,
    GROUP: tl.constexpr, CLASSES: tl.constexpr, CHUNKS: tl.constexpr, TEACHERS: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """What follows from all chunks of a row after a step; the step `LAST` is the one before the gradient."""
    _, _, _, _, _, exponents, _ = logits
    list_numbers, _, _, _ = lists
    _, normalizers, _, _, _, _ = between
    _, _, n_teachers, _ = sizes
    if step == 0:
        if normalizers is not None:
            for k in range(-1, n_teachers):
                join_normalizers(k, row, between, exponents, sizes, numbers, CHUNKS)
        if list_numbers is not None:
            tl.debug_barrier()
            for k in range(n_teachers):
                compare_list(k, row, logits, rows, lists, between, sizes, numbers, WEIGHTING, DIVERGENCE, CHUNKS, LIST)
            tl.debug_barrier()
    if step == LAST:
        join_row(
            row, logits, rows, list_numbers, divisor, between, outputs, sizes, numbers,
            WEIGHTING, CHOICE, DIVERGENCE, CE, GROUP, CLASSES, CHUNKS, TEACHERS,
        )  # fmt: skip


@kernel
def stream(
    student, t0, t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15, teacher_table,
    scales, exponents, places, labels, prior, sample_weight, divisor,
    lists, list_classes, list_logprobs, list_bits,
    fields, normalizers, sums, distances, compared, factors, tickets,
    row_loss, grad, weights, margins, kd, student_margin, teacher_scale, pull,
    row_stride: tl.int64, class_stride: tl.int64,
    teacher_stack: tl.int64, teacher_row_stride: tl.int64, teacher_class_stride: tl.int64, teacher_kinds: tl.int64,
    prior_stride_k: tl.int64, prior_stride_n: tl.int64,
    n_rows: tl.int64, n_classes: tl.int32, n_teachers: tl.int32, n_chunks: tl.int32, lag: tl.int32,
    ignore_index: tl.int64, unlabeled_index: tl.int64,
    exponent: tl.float32, temperature: tl.float32, sharpness: tl.float32,
    mixing: tl.float32, unmixing: tl.float32, kd_weight: tl.float32, ce_weight: tl.float32, label_smoothing: tl.float32,
    STEP: tl.constexpr, ROLE: tl.constexpr, COMPARES: tl.constexpr, WEIGHTING: tl.constexpr, CHOICE: tl.constexpr,
    DIVERGENCE: tl.constexpr, CE: tl.constexpr, STUDENT: tl.constexpr, TEACHER: tl.constexpr, GROUP: tl.constexpr,
    CLASSES: tl.constexpr, CHUNKS: tl.constexpr, TEACHERS: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    """The step `ROLE`, or all of them. `COMPARES`: whether there is one between the statistics and the gradient.

    `tickets`: 0, then 0 for each row and step but the gradient: how many chunks have arrived, and 1 more once the row
    is settled.
    """
    teachers = (
        (t0, t1, t2, t3, t4, t5, t6, t7), (t8, t9, t10, t11, t12, t13, t14, t15),
        teacher_stack, teacher_row_stride, teacher_class_stride, teacher_kinds, teacher_table,
    )  # fmt: skip
    logits = (student, row_stride, class_stride, teachers, scales, exponents, places)
    rows = (labels, sample_weight, (prior, prior_stride_k, prior_stride_n, places), ignore_index, unlabeled_index)
    listed = (lists, list_classes, list_logprobs, list_bits)
    between = (fields, normalizers, sums, distances, compared, factors)
    outputs = (row_loss, weights, margins, kd, student_margin, teacher_scale, pull)
    sizes = (n_rows, n_classes, n_teachers, n_chunks)
    numbers = (exponent, temperature, sharpness, mixing, unmixing, kd_weight, ce_weight, label_smoothing)

    GRADIENT: tl.constexpr = 2 if COMPARES else 1
    number = tl.program_id(0).to(tl.int64)
    role = ROLE
    if STEP == "all":
        number = tl.atomic_add(tickets, 1, sem="relaxed").to(tl.int64)
        role = (number % (GRADIENT + 1)).to(tl.int32)
        number = number // (GRADIENT + 1) - role * (lag * n_chunks)
    elif ROLE == GRADIENT:
        # The rows whose statistics were read last are those that the second-level cache still has.
        number = n_rows * n_chunks - 1 - number
    row = number
    chunk = 0
    if STEP != "rows":
        row = number // n_chunks
        chunk = (number - row * n_chunks).to(tl.int32)

    if (number >= 0) & (row < n_rows):
        arrived = tickets
        if STEP == "all":
            arrived += 1 + role * n_rows + row
            if role > 0:
                while tl.atomic_add(arrived - n_rows, 0, sem="acquire") <= n_chunks:
                    pass
                # Of the whole program.
                tl.debug_barrier()
        if STEP != "rows":
            if role == 0:
                take_statistics(
                    row, chunk, logits, rows, listed, fields, sizes, numbers,
                    student_margin is not None, WEIGHTING, DIVERGENCE, CE, STUDENT, TEACHER, GROUP, CLASSES, LIST,
                )  # fmt: skip
            elif role == GRADIENT:
                write_gradient(
                    row, chunk, logits, labels, listed, normalizers, factors, grad, sizes, numbers,
                    DIVERGENCE, CE, STUDENT, TEACHER, GROUP, CLASSES, LIST,
                )  # fmt: skip
            elif COMPARES:
                compare_chunk(
                    row, chunk, logits, rows, listed, normalizers, sums, distances, sizes, numbers,
                    DIVERGENCE, STUDENT, TEACHER, GROUP, CLASSES, LIST,
                )  # fmt: skip
        if STEP != "chunks":
            is_last = role < GRADIENT
            if STEP == "all" and is_last:
                tl.debug_barrier()
                is_last = tl.atomic_add(arrived, 1, sem="acq_rel") == n_chunks - 1
                tl.debug_barrier()
            if is_last:
                settle(
                    role, row, logits, rows, listed, divisor, between, outputs, sizes, numbers,
                    GRADIENT - 1, WEIGHTING, CHOICE, DIVERGENCE, CE, GROUP, CLASSES, CHUNKS, TEACHERS, LIST,
                )  # fmt: skip
                if STEP == "all":
                    tl.debug_barrier()
                    tl.atomic_add(arrived, 1, sem="release")
