"""From tensors to launches of the kernels."""

import math
import os
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from amtss_fast._triton.common import kernel
from amtss_fast._triton.config import KINDS, Layout, choose_config, choose_layout
from amtss_fast._triton.stream import (
    STUDENT_FIELDS,
    STUDENT_PAIRS,
    TEACHER_FIELDS,
    chunk_gradient,
    chunk_statistics,
    join_chunks,
)
from amtss_fast._triton.tile import fused_tile
from amtss_fast.ops import Arguments, Outputs, gradient_dtype

# Teachers whose pointers are arguments of a kernel, the second half of them only where it is needed. Where more of them
# lie follows from one stride, or is in a table.
SLOTS = 16


@kernel
def write_entry(table, k: tl.int32, beyond: tl.int64, row_stride: tl.int64, class_stride: tl.int64, kind: tl.int64):
    tl.store(table + 4 * k, beyond)
    tl.store(table + 4 * k + 1, row_stride)
    tl.store(table + 4 * k + 2, class_stride)
    tl.store(table + 4 * k + 3, kind)


class Launch(NamedTuple):
    """One kernel with its arguments, by name."""

    kernel: Any
    programs: int
    threads: int
    registers: int
    arguments: dict[str, Any]

    def options(self, warp_size: int, backend: str) -> dict[str, Any]:
        # Fused multiplications and additions round the student's side and the teachers' differently: where they are
        # equal, the gradient would not be exactly 0.
        options = {"num_warps": max(1, self.threads // warp_size), "enable_fp_fusion": False}
        return options | ({"maxnreg": self.registers} if backend == "cuda" else {})

    def run(self) -> None:
        options = self.options(*device_kind())
        kernel = self.kernel
        if os.environ.get("AMTSS_AUTOTUNE") == "1":
            kernel = _tunable(kernel)
            options = {"enable_fp_fusion": False}
        kernel[(self.programs,)](**self.arguments, **options)


@cache
def device_kind() -> tuple[int, str]:
    """Threads of a warp on this machine, and Triton's name of its backend."""
    if not torch.cuda.is_available():
        return 32, "cuda"
    return torch.cuda.get_device_properties().warp_size, "hip" if torch.version.hip else "cuda"


@cache
def _tunable(jitted: Any) -> Any:
    configs = [triton.Config({}, num_warps=warps) for warps in (1, 2, 4, 8, 16)]
    key = [name for name in ("n_classes", "n_teachers") if name in jitted.arg_names]
    return triton.autotune(configs, key)(jitted)


def teacher_arguments(teachers: Sequence[Tensor]) -> tuple[dict[str, Any], list[Launch]]:
    """The arguments from which a kernel finds each teacher, see :func:`~amtss_fast._triton.common.locate_teacher`.

    And the launches that write the table, if there is one.
    """
    n_teachers, first = len(teachers), teachers[0]
    numbers = [list(KINDS).index(t.dtype) for t in teachers]
    uniform = len({t.stride() for t in teachers}) == 1
    slots: list[Tensor | None] = list(teachers[:SLOTS])
    stack, table, launches = 0, None, []
    if uniform and n_teachers > SLOTS and (step := _stack_stride(teachers)):
        stack = SLOTS * step * first.element_size()
    elif n_teachers > SLOTS or not uniform:
        # Written by a kernel from its arguments: a copy from the host would wait, and could not be captured in a graph.
        table = first.new_empty((n_teachers, 4), dtype=torch.int64)
        for k, (t, number) in enumerate(zip(teachers, numbers, strict=True)):
            entry = (table, k, t.data_ptr() - teachers[k % SLOTS].data_ptr(), *t.stride(), number)
            launches.append(Launch(write_entry, 1, 32, 32, dict(zip(write_entry.arg_names, entry, strict=True))))
    n_slots = SLOTS if n_teachers > SLOTS // 2 else SLOTS // 2
    slots += slots[-1:] * (n_slots - len(slots)) + [None] * (SLOTS - n_slots)
    arguments = {
        **{f"t{k}": slot for k, slot in enumerate(slots)},
        "teacher_table": table,
        "teacher_stack": stack,
        "teacher_row_stride": first.stride(0),
        "teacher_class_stride": first.stride(1),
        "teacher_kinds": sum(number << 2 * k for k, number in enumerate(numbers[:SLOTS])),
        "TEACHER": list(KINDS.values())[numbers[0]] if len(set(numbers)) == 1 else "mixed",
    }
    return arguments, launches


def _stack_stride(teachers: Sequence[Tensor]) -> int | None:
    """Elements from one teacher to the next, if they are the layers of one tensor."""
    first, second = teachers[0], teachers[1]
    step = second.storage_offset() - first.storage_offset()
    for k, t in enumerate(teachers):
        if t.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() or t.dtype != first.dtype:
            return None
        if t.storage_offset() != first.storage_offset() + k * step:
            return None
    return step if step > 0 else None


def plan(layout: Layout, n_teachers: int, arguments: dict[str, Any]) -> list[Launch]:
    """The launches for [N, C]: one where a row fits on chip, else chunks, their union, and the gradient."""
    n_rows, n_classes = arguments["n_rows"], arguments["n_classes"]
    config = choose_config(n_classes, layout, arguments["TEACHER"])
    n_chunks = 1 if config.rows > 1 else triton.cdiv(n_classes + layout.slack, config.classes)
    arguments |= {
        "GROUP": layout.group,
        "ROWS": config.rows,
        "CLASSES": config.classes,
        "TEACHERS": triton.next_power_of_2(n_teachers),
    }

    def launch(jitted: Any, programs: int, threads: int = config.threads) -> Launch:
        own = {name: arguments[name] for name in jitted.arg_names}
        return Launch(jitted, programs, threads, config.registers, own)

    if n_chunks == 1:
        return [launch(fused_tile, triton.cdiv(n_rows, config.rows))]
    new = arguments["row_loss"].new_empty
    arguments |= {
        "n_chunks": n_chunks,
        "CHUNKS": triton.next_power_of_2(n_chunks),
        "fields": new((STUDENT_FIELDS.value + n_teachers * TEACHER_FIELDS.value, n_rows, n_chunks)),
        "factors": new((STUDENT_PAIRS.value + n_teachers, n_rows, 2)),
    }
    launches = [launch(chunk_statistics, n_rows * n_chunks), launch(join_chunks, n_rows, 32)]
    if arguments["grad"] is not None:
        launches.append(launch(chunk_gradient, n_rows * n_chunks))
    return launches


def prepare(given: Arguments) -> tuple[list[Launch], Outputs, Tensor | None]:
    """The launches that compute the loss; the outputs, with the loss of each row in place of the loss; the divisor."""
    student, labels, n_teachers = given.student_logits, given.labels, len(given.teacher_logits)
    n_rows, n_classes = student.shape
    new = student.new_empty
    row_loss = new(n_rows, dtype=torch.float32)
    grad = new((n_rows, n_classes) if given.need_grad else (0,), dtype=gradient_dtype(student))
    per_teacher = (n_teachers, n_rows) if given.need_stats else (0,)
    weights, margins, kd = (new(per_teacher, dtype=torch.float32) for _ in range(3))
    student_margin = new(n_rows if given.need_stats else 0, dtype=torch.float32)

    divisor = None
    if given.reduction == "mean":
        divisor = _divisor(student, labels, given.num_items, given.ignore_index)
    launches: list[Launch] = []
    if n_rows > 0:
        prior = _prior(given.teacher_prior, given.teacher_mask, n_teachers, n_rows)
        # float32 knows no smaller beta, and no larger one.
        beta = given.weight_temperature
        choice = "hard" if beta < 2.0**-126 else "flat" if beta >= 2.0**128 else "soft"
        teachers, launches = teacher_arguments(given.teacher_logits)
        arguments = {
            **teachers,
            "student": student,
            "row_stride": student.stride(0),
            "class_stride": student.stride(1),
            "STUDENT": KINDS[student.dtype],
            "scales": _scales(given.teacher_row_max, given.teacher_step),
            "labels": None if labels is None else labels.contiguous(),
            "prior": prior,
            "prior_stride_k": 0 if prior is None else prior.stride(0),
            "prior_stride_n": 0 if prior is None else prior.stride(1),
            "sample_weight": None if given.sample_weight is None else given.sample_weight.contiguous(),
            "divisor": divisor,
            "row_loss": row_loss,
            "grad": grad if given.need_grad else None,
            "weights": weights if given.need_stats else None,
            "margins": margins if given.need_stats else None,
            "kd": kd if given.need_stats else None,
            "student_margin": student_margin if given.need_stats else None,
            "n_rows": n_rows,
            "n_classes": n_classes,
            # Teachers that are neither learnt from nor asked about are not read.
            "n_teachers": n_teachers if given.kd_weight > 0 or given.need_stats else 0,
            "ignore_index": given.ignore_index,
            "unlabeled_index": given.unlabeled_index,
            "exponent": 1 / (given.temperature * math.log(2)),
            "temperature": given.temperature,
            "weight_temperature": beta,
            "kd_weight": given.kd_weight,
            "ce_weight": given.ce_weight,
            "label_smoothing": given.label_smoothing,
            "WEIGHTING": given.weighting,
            "CHOICE": choice,
            "CE": given.ce_weight > 0 and labels is not None,
        }
        layout = choose_layout(n_classes, [student, *given.teacher_logits, *([grad] if given.need_grad else [])])
        launches += plan(layout, n_teachers, arguments)
    return launches, (row_loss, grad, weights, margins, kd, student_margin), divisor


def amtss_loss(given: Arguments) -> Outputs:
    """Loss, gradient and stats; see the schema in :mod:`amtss_fast.ops`. Nothing here waits for the device."""
    with torch.cuda.device_of(given.student_logits):
        launches, (loss, *others), divisor = prepare(given)
        for launch in launches:
            launch.run()
    if given.reduction != "none":
        loss = loss.sum() if divisor is None else loss.sum() / divisor
    grad, weights, margins, kd, student_margin = others
    return loss, grad, weights, margins, kd, student_margin


def _divisor(student_logits: Tensor, labels: Tensor | None, num_items: Tensor | None, ignore_index: int) -> Tensor:
    """What divides a mean, 0-d on the device: counted there, because a number on the host would wait for it."""
    if num_items is not None:
        return num_items.float()
    if labels is None:
        return student_logits.new_full((), max(len(student_logits), 1), dtype=torch.float32)
    return (labels != ignore_index).sum().clamp(min=1).float()


def _prior(teacher_prior: Tensor | None, teacher_mask: Tensor | None, n_teachers: int, n_rows: int) -> Tensor | None:
    """Prior and mask as one [K, N]: a teacher that does not teach a row has the prior 0."""
    if teacher_prior is None:
        return teacher_mask
    prior = teacher_prior.reshape(n_teachers, -1).expand(n_teachers, n_rows)
    return prior if teacher_mask is None else prior.where(teacher_mask, 0)


def _scales(row_max: Sequence[Tensor | None], step: Sequence[Tensor | None]) -> Tensor | None:
    """row_max and step of all teachers, [2, K, N] and small; None if none is quantised."""
    given = next((t for t in row_max if t is not None), None)
    if given is None:
        return None
    return torch.stack([given.new_zeros(given.shape) if t is None else t.float() for t in (*row_max, *step)])
