"""From tensors to launches of the kernels.

What follows from types, strides and options alone is a :class:`Plan`, made once; a call adds its tensors and numbers.
"""

import math
import os
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

import triton
import triton.language as tl
from amtss_fast.loss.contract import AMTSSStats, LossInputs, LossOutputs, gradient_dtype
from amtss_fast.loss.options import LossOptions
from triton.backends.compiler import GPUTarget

from .common import kernel
from .config import KINDS, Config, choose_chunks, choose_config, choose_layout
from .stream import (
    STUDENT_CHUNK_PAIRS,
    STUDENT_PAIRS,
    TEACHER_CHUNK_PAIRS,
    chunk_gradient,
    chunk_statistics,
    join_chunks,
)
from .tile import fused_tile
from .total import BLOCK, COUNTED, FEW_ROWS, ONE_PROGRAM, PARTS, add_rows, count_rows

# Teachers whose pointers are arguments of a kernel, the second half of them only where it is needed. Where more of them
# lie follows from one stride, or is in a table.
SLOTS = 16
_SLOT_NAMES = [f"t{k}" for k in range(SLOTS)]
_KIND_NUMBERS = {dtype: number for number, dtype in enumerate(KINDS)}
# No layout depends on more of an address: sixteen elements of the widest type.
_ALIGNMENT = 64
# A compiled kernel takes all arguments of its function; before, it took those that are no constants.
_LAUNCHES_DIRECTLY = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)


@kernel
def write_entry(table, k: tl.int32, beyond: tl.int64, row_stride: tl.int64, class_stride: tl.int64, kind: tl.int64):
    tl.store(table + 4 * k, beyond)
    tl.store(table + 4 * k + 1, row_stride)
    tl.store(table + 4 * k + 2, class_stride)
    tl.store(table + 4 * k + 3, kind)


class Binary:
    """A kernel for arguments of the same types and constants, on the same device, at every launch.

    The first launch compiles it. Triton would find it again by the types of all arguments, which takes longer than to
    launch it.
    """

    def __init__(self, kernel: Any, threads: int, registers: int | None = None) -> None:
        self.kernel = kernel
        self.threads = threads
        self.registers = registers
        self._pick = itemgetter(*kernel.arg_names)
        self._compiled: Any = None

    def options(self, target: GPUTarget) -> dict[str, Any]:
        # Fused multiplications and additions round the student's side and the teachers' differently: where they are
        # equal, the gradient would not be exactly 0.
        options = {"num_warps": max(1, self.threads // target.warp_size), "enable_fp_fusion": False}
        if self.registers is None or target.backend != "cuda":
            return options
        # The assembler for Blackwell takes more of them for the same code before it does without spilling.
        registers = self.registers if target.arch < 100 else min(255, self.registers * 3 // 2)
        return options | {"maxnreg": registers}

    def launch(self, programs: int, values: Sequence[Any]) -> None:
        """On the current device; `values`: all arguments, in order."""
        if self._compiled is not None:
            self._compiled[(programs, 1, 1)](*values)
            return
        compiled = self.kernel[(programs,)](*values, **self.options(current_target()))
        if _LAUNCHES_DIRECTLY and not interpreted():
            self._compiled = compiled

    def of(self, programs: int, arguments: dict[str, Any]) -> "Launch":
        """A launch with those of `arguments` that the kernel takes."""
        return Launch(self, programs, self._pick(arguments))


class Launch(NamedTuple):
    """One kernel with its arguments, in order."""

    binary: Binary
    programs: int
    values: tuple[Any, ...]

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(zip(self.binary.kernel.arg_names, self.values, strict=True))


def launch_all(launches: Sequence[Launch]) -> None:
    """Launches kernels in order on the current device."""
    if os.environ.get("AMTSS_AUTOTUNE") == "1":
        for launch in launches:
            _tunable(launch.binary.kernel)[(launch.programs,)](**launch.arguments, enable_fp_fusion=False)
        return
    for binary, programs, values in launches:
        binary.launch(programs, values)


def interpreted() -> bool:
    """Whether kernels run without a device: there is nothing that could be launched again."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def current_target() -> GPUTarget:
    """What Triton compiles for on this machine."""
    if interpreted():
        return GPUTarget("cuda", 90, 32)
    return triton.runtime.driver.active.get_current_target()


@cache
def _tunable(jitted: Any) -> Any:
    configs = [triton.Config({}, num_warps=warps) for warps in (1, 2, 4, 8, 16)]
    key = [name for name in ("n_classes", "n_teachers") if name in jitted.arg_names]
    return triton.autotune(configs, key)(jitted)


class Logits(NamedTuple):
    """What is to be known about a tensor [N, C] to plan its way through memory: of its address the last bits."""

    dtype: torch.dtype
    strides: tuple[int, int]
    address: int

    def element_size(self) -> int:
        return self.dtype.itemsize

    def stride(self, dim: int) -> int:
        return self.strides[dim]

    def data_ptr(self) -> int:
        return self.address


class Call(NamedTuple):
    """What a plan depends on. No tensors: two calls that are equal here have the same plan, whatever they compute."""

    # -1: the CPU, in Triton's interpreter.
    device: int
    n_classes: int
    student: tuple[torch.dtype, tuple[int, ...], int]
    teachers: tuple[tuple[torch.dtype, tuple[int, ...], int], ...]
    grad: tuple[torch.dtype, tuple[int, ...], int] | None
    # Types of the other arguments; None: not given.
    table: torch.dtype | None
    scales: torch.dtype | None
    labels: torch.dtype | None
    prior: torch.dtype | None
    sample_weight: torch.dtype | None
    divisor: torch.dtype | None
    weighting: str
    choice: str
    ce: bool
    need_stats: bool


class Step(NamedTuple):
    """One kernel of a plan, with the arguments that are its own, and what its programs share out among them."""

    binary: Binary
    own: dict[str, Any]
    # Rows of a program, and programs of a row: one of the two is 1.
    rows: int
    chunks: int


class Plan(NamedTuple):
    """One kernel where a row fits on chip, else chunks, their union, and the gradient."""

    constants: dict[str, Any]
    steps: tuple[Step, ...]


@lru_cache(maxsize=1024)
def make_plan(call: Call) -> Plan:
    student, *teachers = (Logits(*tensor) for tensor in (call.student, *call.teachers))
    dtypes = [t.dtype for t in teachers]
    teacher = KINDS[dtypes[0]] if len(set(dtypes)) == 1 else "mixed"
    logits = [student, *teachers, *([Logits(*call.grad)] if call.grad else [])]
    layout = choose_layout(call.n_classes, logits)
    constants = {
        "n_classes": call.n_classes,
        "row_stride": student.stride(0),
        "class_stride": student.stride(1),
        "teacher_row_stride": teachers[0].stride(0),
        "teacher_class_stride": teachers[0].stride(1),
        "teacher_kinds": sum(_KIND_NUMBERS[dtype] << 2 * k for k, dtype in enumerate(dtypes[:SLOTS])),
        "STUDENT": KINDS[student.dtype],
        "TEACHER": teacher,
        "WEIGHTING": call.weighting,
        "CHOICE": call.choice,
        "CE": call.ce,
        "GROUP": layout.group,
        "TEACHERS": triton.next_power_of_2(len(teachers)),
    }

    def step(kernel: Any, config: Config, rows: int, chunks: int, **own: Any) -> Step:
        own |= {"ROWS": config.rows, "CLASSES": config.classes}
        return Step(Binary(kernel, config.threads, config.registers), own, rows, chunks)

    extras = call.ce or call.need_stats
    config = choose_config(call.n_classes, layout, teacher, extras)
    if config is not None:
        return Plan(constants, (step(fused_tile, config, config.rows, 1),))
    statistics, gradient = choose_chunks(layout, teacher, extras)
    n_chunks = triton.cdiv(call.n_classes + layout.slack, statistics.classes)
    union = Config(1, statistics.classes, 32, 255)
    steps = [
        step(chunk_statistics, statistics, 1, n_chunks, n_chunks=n_chunks),
        step(join_chunks, union, 1, 1, n_chunks=n_chunks, CHUNKS=triton.next_power_of_2(n_chunks)),
    ]
    if call.grad is not None:
        n_chunks = triton.cdiv(call.n_classes + layout.slack, gradient.classes)
        steps.append(step(chunk_gradient, gradient, 1, n_chunks, n_chunks=n_chunks))
    return Plan(constants, tuple(steps))


def binaries(kernel: Any, threads: int) -> Callable[..., Binary]:
    """Of a kernel that belongs to no plan: from its device, and whatever its types and constants follow, its binary."""
    return cache(lambda *_: Binary(kernel, threads))


_write_entry = binaries(write_entry, 32)
_count_rows = binaries(count_rows, 256)
_add_rows = binaries(add_rows, 1024)


def teacher_arguments(teachers: Sequence[Tensor]) -> tuple[dict[str, Any], list[Launch]]:
    """Where a kernel finds each teacher, see `common.locate_teacher`.

    And the launches that write the table, if there is one.
    """
    n_teachers, first = len(teachers), teachers[0]
    n_slots = SLOTS if n_teachers > SLOTS // 2 else SLOTS // 2
    slots: list[Tensor | None] = list(teachers[:SLOTS])
    slots += slots[-1:] * (n_slots - len(slots)) + [None] * (SLOTS - n_slots)
    arguments: dict[str, Any] = dict(zip(_SLOT_NAMES, slots, strict=True))
    strides = [t.stride() for t in teachers]
    uniform = strides.count(strides[0]) == n_teachers
    stack, table, launches = 0, None, []
    if uniform and n_teachers > SLOTS and (step := _stack_stride(teachers)):
        stack = SLOTS * step * first.element_size()
    elif n_teachers > SLOTS or not uniform:
        # Written by a kernel from its arguments: a copy from the host would wait, and could not be captured in a graph.
        table = first.new_empty((n_teachers, 4), dtype=torch.int64)
        binary = _write_entry(first.get_device())
        for k, t in enumerate(teachers):
            beyond = t.data_ptr() - teachers[k % SLOTS].data_ptr()
            launches.append(Launch(binary, 1, (table, k, beyond, *t.stride(), _KIND_NUMBERS[t.dtype])))
    arguments["teacher_stack"] = stack
    arguments["teacher_table"] = table
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


def prepare(
    inputs: LossInputs, options: LossOptions, *, need_grad: bool, need_stats: bool
) -> tuple[list[Launch], LossOutputs]:
    """The launches that compute the loss, in order, and the outputs that they write."""
    student, labels, n_teachers = inputs.student_logits, inputs.labels, len(inputs.teacher_logits)
    n_rows, n_classes = student.shape
    new = student.new_empty
    launches: list[Launch] = []
    row_loss = new(n_rows, dtype=torch.float32)
    grad = new((n_rows, n_classes), dtype=gradient_dtype(student)) if need_grad else None
    stats = None
    if need_stats:
        per_teacher = [new((n_teachers, n_rows), dtype=torch.float32) for _ in range(3)]
        stats = AMTSSStats(*per_teacher, new(n_rows, dtype=torch.float32))
    if labels is not None:
        # A kernel tells labels from counts by their type.
        labels = labels.long().contiguous()
    divisor = None
    if options.reduction == "mean":
        if inputs.num_items is not None:
            # Integers would be taken for counts.
            divisor = inputs.num_items if inputs.num_items.is_floating_point() else inputs.num_items.double()
        elif labels is not None:
            divisor = _count(labels, options.ignore_index, launches)
        else:
            divisor = row_loss.new_full((), max(n_rows, 1))
    if n_rows > 0:
        _compute_rows(inputs, options, labels, divisor, row_loss, grad, stats, launches)
    loss = row_loss if options.reduction == "none" else _add(row_loss, divisor, options.ignore_index, launches)
    return launches, LossOutputs(loss, grad, stats)


def _compute_rows(
    inputs: LossInputs,
    options: LossOptions,
    labels: Tensor | None,
    divisor: Tensor | None,
    row_loss: Tensor,
    grad: Tensor | None,
    stats: AMTSSStats | None,
    launches: list[Launch],
) -> None:
    """Add the launches that write the loss of each row, the gradient and the stats."""
    student, teachers = inputs.student_logits, inputs.teacher_logits
    n_rows, n_classes = student.shape
    n_teachers = len(teachers)
    prior = _prior(inputs.teacher_prior, inputs.teacher_mask, n_teachers, n_rows)
    scales = _scales(inputs.teacher_row_max, inputs.teacher_step)
    sample_weight = None if inputs.sample_weight is None else inputs.sample_weight.contiguous()
    where, before = teacher_arguments(teachers)
    # float32 knows no smaller beta, and no larger one.
    beta = options.weight_temperature
    choice = "hard" if beta < 2.0**-126 else "flat" if beta >= 2.0**128 else "soft"
    table = where["teacher_table"]
    plan = make_plan(
        Call(
            student.get_device(),
            n_classes,
            _describe(student),
            tuple([_describe(t) for t in teachers]),
            None if grad is None else _describe(grad),
            _type(table),
            _type(scales),
            _type(labels),
            _type(prior),
            _type(sample_weight),
            _type(divisor),
            options.weighting,
            choice,
            options.ce_weight > 0 and labels is not None,
            stats is not None,
        )
    )
    weights, margins, kd, student_margin = stats or [None] * 4
    arguments = {
        **plan.constants,
        **where,
        "student": student,
        "scales": scales,
        "labels": labels,
        "prior": prior,
        "prior_stride_k": 0 if prior is None else prior.stride(0),
        "prior_stride_n": 0 if prior is None else prior.stride(1),
        "sample_weight": sample_weight,
        "divisor": divisor,
        "row_loss": row_loss,
        "grad": grad,
        "weights": weights,
        "margins": margins,
        "kd": kd,
        "student_margin": student_margin,
        "n_rows": n_rows,
        # Teachers that are neither learnt from nor asked about are not read.
        "n_teachers": n_teachers if options.kd_weight > 0 or stats is not None else 0,
        "ignore_index": options.ignore_index,
        "unlabeled_index": options.unlabeled_index,
        "exponent": 1 / (options.temperature * math.log(2)),
        "temperature": options.temperature,
        # The other two choices do not ask.
        "sharpness": 1 / beta if choice == "soft" else 1.0,
        "kd_weight": options.kd_weight,
        "ce_weight": options.ce_weight,
        "label_smoothing": options.label_smoothing,
    }
    launches += before
    if len(plan.steps) > 1:
        n_chunks = plan.steps[0].chunks
        pairs = STUDENT_CHUNK_PAIRS.value + n_teachers * TEACHER_CHUNK_PAIRS.value
        arguments["fields"] = row_loss.new_empty((pairs, n_rows, n_chunks, 2))
        arguments["factors"] = row_loss.new_empty((STUDENT_PAIRS.value + n_teachers, n_rows, 2))
    for binary, own, rows, chunks in plan.steps:
        launches.append(binary.of(-(-n_rows // rows) * chunks, arguments | own))


def amtss_loss(inputs: LossInputs, options: LossOptions, *, need_grad: bool, need_stats: bool) -> LossOutputs:
    """See :class:`amtss_fast.loss.contract.Backend`. Nothing here waits for the device."""
    with torch.cuda.device_of(inputs.student_logits):
        launches, outputs = prepare(inputs, options, need_grad=need_grad, need_stats=need_stats)
        launch_all(launches)
    return outputs


def _describe(t: Tensor) -> tuple[torch.dtype, tuple[int, ...], int]:
    return t.dtype, t.stride(), t.data_ptr() % _ALIGNMENT


def _type(argument: Tensor | None) -> torch.dtype | None:
    return None if argument is None else argument.dtype


def _count(labels: Tensor, ignore_index: int, launches: list[Launch]) -> Tensor:
    """The number of rows that count, as `total.read_divisor` takes it.

    On the device: a number on the host would wait for it.
    """
    n_rows = labels.shape[0]
    if n_rows <= FEW_ROWS:
        return labels
    parts = labels.new_empty(PARTS.value, dtype=torch.int32)
    launches.append(
        Launch(_count_rows(labels.get_device()), PARTS.value, (labels, parts, n_rows, ignore_index, COUNTED))
    )
    return parts


def _add(row_loss: Tensor, divisor: Tensor | None, ignore_index: int, launches: list[Launch]) -> Tensor:
    """The sum of `row_loss`, over the divisor where there is one."""
    device, n_rows = row_loss.get_device(), row_loss.shape[0]
    if n_rows > ONE_PROGRAM:
        parts = row_loss.new_empty(PARTS.value)
        binary = _add_rows(device, None)
        launches.append(Launch(binary, PARTS.value, (row_loss, parts, None, n_rows, ignore_index, BLOCK)))
        row_loss, n_rows = parts, PARTS.value
    loss = row_loss.new_empty(())
    binary = _add_rows(device, _type(divisor))
    launches.append(Launch(binary, 1, (row_loss, loss, divisor, n_rows, ignore_index, BLOCK)))
    return loss


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
