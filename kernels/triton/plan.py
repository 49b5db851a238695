"""The launch plan: which kernels run a call, in which configuration, with which constants."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

import triton

from .binary import Binary, multiprocessors
from .config import KINDS, Config, Demands, Logits, choose_chunks, choose_config, choose_lag, choose_layout
from .device.stream import stream
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
    two_reads: bool
    """Whether long rows are read twice though once would do."""


class Step(NamedTuple):
    """One kernel of a plan, its own arguments, and the size of its programs."""

    binary: Binary
    own: dict[str, Any]
    rows: int = 1
    """Rows of a program; 1 if a row has several programs."""
    chunks: int = 1
    """Programs of a row; 1 if a program has several rows."""
    roles: int = 1
    """Programs of a chunk, each `lag` rows behind the one before."""
    lag: int = 0

    def programs(self, n_rows: int) -> int:
        return self.roles * (-(-n_rows // self.rows) + (self.roles - 1) * self.lag) * self.chunks


class LaunchPlan(NamedTuple):
    """One step if a row fits on chip or is read once; otherwise those of `device/stream.py`, one after the other."""

    constants: dict[str, Any]
    steps: tuple[Step, ...]
    chunks: int = 0
    """Of a row, in the step that takes its statistics; 0: the row fits on chip."""
    normalizes: bool = False
    """Whether a step needs the normalizers of whole rows before the gradient."""

    @property
    def divergence(self) -> str:
        return str(self.constants["DIVERGENCE"])


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
    demands = Demands(layout, teacher, call.divergence, call.ce, call.need_stats, call.list_length)
    constants = _constants(call, teacher, layout.group)
    config = choose_config(call.n_classes, demands)
    if config is not None:
        return LaunchPlan(constants, (_step(fused_tile, config, {}, rows=config.rows),))
    compares = not call.only_lists and (call.need_stats or sums_terms(call.divergence))
    steps, chunks = _stream_steps(call, demands, compares)
    normalizes = has_lists or call.need_stats or call.divergence != "forward_kl"
    return LaunchPlan(constants | {"COMPARES": compares}, steps, chunks, normalizes)


def _stream_steps(call: Call, demands: Demands, compares: bool) -> tuple[tuple[Step, ...], int]:
    """The launches of `device/stream.py`, and how many chunks a row has for its statistics."""
    configs = choose_chunks(demands)

    def step(name: str, role: int, config: Config, roles: int = 1) -> Step:
        n_chunks = triton.cdiv(call.n_classes + demands.layout.slack, config.classes)
        lag = choose_lag(n_chunks, config, multiprocessors(call.device))
        own = {"STEP": name, "ROLE": role, "n_chunks": n_chunks, "CHUNKS": triton.next_power_of_2(n_chunks), "lag": lag}
        return _step(stream, config, own, chunks=1 if name == "rows" else n_chunks, roles=roles, lag=lag)

    if call.grad is not None and configs.one_read is not None and not call.two_reads:
        steps = [step("all", 0, configs.one_read, roles=3 if compares else 2)]
    else:
        steps = [step("chunks", 0, configs.statistics), step("rows", 0, configs.rows)]
        if compares:
            steps += [step("chunks", 1, configs.terms), step("rows", 1, configs.rows)]
        if call.grad is not None:
            steps.append(step("chunks", 1 + compares, configs.gradient))
    return tuple(steps), steps[0].chunks


def _step(kernel: Any, config: Config, own: dict[str, Any], **size: int) -> Step:
    own = own | {"ROWS": config.rows, "CLASSES": config.classes}
    return Step(Binary(kernel, config.threads, config.registers), own, **size)


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
