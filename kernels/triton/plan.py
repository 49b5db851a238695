"""The launch plan: which kernels run a call, in which configuration, with which constants."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

import triton

from .binary import Binary
from .config import KINDS, Config, Logits, choose_chunks, choose_config, choose_layout
from .device.lists import compare_lists
from .device.stream import chunk_divergences, chunk_gradient, chunk_statistics, join_chunks, join_normalizers
from .device.tile import fused_tile
from .teachers import KIND_NUMBERS, SLOTS

# Layouts depend on an address up to this many bytes: sixteen elements of the widest type.
_ALIGNMENT = 64


def describe(t: Tensor) -> Logits:
    """The properties of `t`."""
    return Logits(t.dtype, t.stride(), t.data_ptr() % _ALIGNMENT)


class Call(NamedTuple):
    """What a plan depends on. It holds no tensors: equal calls have the same plan."""

    device: int
    """-1: the CPU, in Triton's interpreter."""
    n_classes: int
    student: Logits
    teachers: tuple[Logits, ...]
    grad: Logits | None
    table: torch.dtype | None
    """The types of the other arguments; None: not given."""
    scales: torch.dtype | None
    exponents: torch.dtype | None
    places: torch.dtype | None
    list_length: int
    """Places of a list, 0 without lists."""
    only_lists: bool
    """Whether no teacher has logits."""
    labels: torch.dtype | None
    prior: torch.dtype | None
    sample_weight: torch.dtype | None
    divisor: torch.dtype | None
    weighting: str
    choice: str
    """The softmax over teachers: "hard" for temperature 0, "flat" for infinity, otherwise "soft"."""
    divergence: str
    ce: bool
    need_stats: bool


class Step(NamedTuple):
    """One kernel of a plan, its own arguments, and the size of its programs."""

    binary: Binary
    own: dict[str, Any]
    rows: int
    """Rows of a program; 1 if a row has several programs."""
    chunks: int
    """Programs of a row; 1 if a program has several rows."""


class LaunchPlan(NamedTuple):
    """One step if a row fits on chip; otherwise the statistics of chunks, their union, and the gradient."""

    constants: dict[str, Any]
    steps: tuple[Step, ...]

    @property
    def divergence(self) -> str:
        return str(self.constants["DIVERGENCE"])

    def has(self, kernel: Any) -> bool:
        """Whether one of the steps is `kernel`."""
        return any(step.binary.kernel is kernel for step in self.steps)


def sums_terms(divergence: str) -> bool:
    """Whether the divergence of long rows does not follow from their statistics."""
    return divergence not in ("forward_kl", "reverse_kl")


@lru_cache(maxsize=1024)
def make_plan(call: Call) -> LaunchPlan:
    """The plan of a call. Its binaries are compiled at their first launch and kept with the plan."""
    logits = [call.student, *call.teachers, *([call.grad] if call.grad else [])]
    has_lists = call.list_length > 0
    layout = choose_layout(call.n_classes, logits, call.places is not None, call.divergence, has_lists)
    dtypes = {t.dtype for t in call.teachers}
    teacher = KINDS[call.teachers[0].dtype] if len(dtypes) == 1 else "mixed"
    constants = _constants(call, teacher, layout.group)
    extras = call.ce or call.need_stats
    config = choose_config(call.n_classes, layout, teacher, extras, call.divergence, call.need_stats, has_lists)
    if config is not None:
        return LaunchPlan(constants, (_step(fused_tile, config, config.rows, 1),))
    configs = choose_chunks(layout, teacher, extras, call.divergence, call.need_stats, has_lists)
    n_chunks = triton.cdiv(call.n_classes + layout.slack, configs.statistics.classes)
    union = Config(1, configs.statistics.classes, 32, 255)
    pieces = {"n_chunks": n_chunks, "CHUNKS": triton.next_power_of_2(n_chunks)}
    steps = [_step(chunk_statistics, configs.statistics, 1, n_chunks, n_chunks=n_chunks)]
    if has_lists or call.need_stats or call.divergence != "forward_kl":
        steps.append(_step(join_normalizers, union, 1, 1 + len(call.teachers), **pieces))
    if has_lists:
        lists = Config(1, call.list_length, min(256, max(32, call.list_length // 8)), 255)
        steps.append(_step(compare_lists, lists, 1, len(call.teachers), **pieces))
    if not call.only_lists and (call.need_stats or sums_terms(call.divergence)):
        steps.append(_step(chunk_divergences, configs.divergences, 1, n_chunks, n_chunks=n_chunks))
    steps.append(_step(join_chunks, union, 1, 1, **pieces))
    if call.grad is not None:
        n_chunks = triton.cdiv(call.n_classes + layout.slack, configs.gradient.classes)
        steps.append(_step(chunk_gradient, configs.gradient, 1, n_chunks, n_chunks=n_chunks))
    return LaunchPlan(constants, tuple(steps))


def _step(kernel: Any, config: Config, rows: int, chunks: int, **own: Any) -> Step:
    own |= {"ROWS": config.rows, "CLASSES": config.classes}
    return Step(Binary(kernel, config.threads, config.registers), own, rows, chunks)


def _constants(call: Call, teacher: str, group: int) -> dict[str, Any]:
    """The arguments of the kernels that follow from the call alone."""
    return {
        "n_classes": call.n_classes,
        "row_stride": call.student.stride(0),
        "class_stride": call.student.stride(1),
        "teacher_row_stride": call.teachers[0].stride(0),
        "teacher_class_stride": call.teachers[0].stride(1),
        "teacher_kinds": sum(KIND_NUMBERS[t.dtype] << 2 * k for k, t in enumerate(call.teachers[:SLOTS])),
        "STUDENT": KINDS[call.student.dtype],
        "TEACHER": teacher,
        "WEIGHTING": call.weighting,
        "CHOICE": call.choice,
        "DIVERGENCE": call.divergence,
        "CE": call.ce,
        "GROUP": group,
        "LIST": call.list_length,
        "TEACHERS": triton.next_power_of_2(len(call.teachers)),
    }
