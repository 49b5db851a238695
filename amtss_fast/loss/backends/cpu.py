"""The native CPU backend: passes the addresses of tensors to the C++ kernel `amtss_fast._cpu`."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from amtss_fast.loss.checks import check_num_items, raise_label, raise_weight
from amtss_fast.loss.contract import AMTSSStats, LossInputs, LossOutputs, empty_stats, gradient_dtype
from amtss_fast.loss.options import OPTION_NAMES, LossOptions

_MISSING: str | None = None
try:
    import amtss_fast._cpu as _cpu
except ImportError as error:
    _MISSING = f"the compiled module amtss_fast._cpu cannot be imported ({error}); install with a C++ compiler"
else:
    # AMTSS_CPU_ISA may name an instruction set that the machine lacks: an error, not a reason for another backend.
    _cpu.instruction_set()

CHECKS_VALUES = True
scale_gradient = None

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
_MAX_TEACHERS = 256
NOT_NATIVE = ("reduction", "teacher_temperature")
"""The options that are no part of the C++ struct: the kernel gets a divisor, and a temperature with each matrix."""
_MAX_CLASSES = 2**31 - 1


def why_missing() -> str | None:
    """Why this machine cannot run the backend; None if it can."""
    return _MISSING


def release_memory() -> None:
    """Returns the memory kept for the next large gradient to the system."""
    if _MISSING is None:
        _cpu.release_memory()


def instruction_set() -> str:
    """The instruction set in use: the best of the machine, or what AMTSS_CPU_ISA names."""
    return str(_cpu.instruction_set())


def why_not(inputs: LossInputs, options: LossOptions) -> str | None:
    """Why the backend cannot run this call; None if it can."""
    student_logits, teacher_logits = inputs.student_logits, inputs.teacher_logits
    if student_logits.device.type != "cpu":
        return f"it runs CPU tensors, student_logits are on {student_logits.device}"
    if student_logits.dtype not in _TYPES:
        return f"student_logits are {student_logits.dtype}; it takes float32, bfloat16 and float16"
    if student_logits.shape[1] > _MAX_CLASSES:
        return f"there are {student_logits.shape[1]} classes; it takes up to {_MAX_CLASSES}"
    if len(teacher_logits) > _MAX_TEACHERS:
        return f"there are {len(teacher_logits)} teachers; it takes up to {_MAX_TEACHERS}"
    for k, teacher in enumerate(teacher_logits):
        if teacher.dtype not in _TYPES:
            return f"teacher_logits[{k}] is {teacher.dtype}; it takes float32, bfloat16, float16 and 8-bit codes"
    return None


@functools.lru_cache(maxsize=1024)
def native_options(options: LossOptions) -> Any:
    """The C++ struct of the options."""
    native = _cpu.Options()
    for name in OPTION_NAMES:
        if name not in NOT_NATIVE and getattr(options, name) is not None:
            setattr(native, name, getattr(options, name))
    return native


def amtss_loss(inputs: LossInputs, options: LossOptions, *, need_grad: bool, need_stats: bool) -> LossOutputs:
    """See :class:`amtss_fast.loss.contract.Backend`."""
    native = native_options(options)
    student, n_teachers = inputs.student_logits, len(inputs.teacher_logits)
    n_rows, n_classes = student.shape
    # Holds the copies that a stride or a dtype makes necessary until the call is over, and what is made here.
    alive = []

    def address(tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> int:
        if tensor is None:
            return 0
        if tensor.dtype is not dtype or not tensor.is_contiguous():
            tensor = tensor.to(dtype).contiguous()
        alive.append(tensor)
        return tensor.data_ptr()

    matrices = [student.data_ptr(), *student.stride(), _TYPES[student.dtype], *[0] * 6]
    for k, teacher in enumerate(inputs.teacher_logits):
        matrices += (teacher.data_ptr(), *teacher.stride(), _TYPES[teacher.dtype])
        if inputs.teacher_row_max:
            matrices += (address(inputs.teacher_row_max[k]), address(inputs.teacher_step[k]))
        else:
            matrices += (0, 0)
        matrices.append(address(_places(inputs.teacher_rows, k, n_rows), torch.int32))
        if inputs.teacher_indices and (classes := inputs.teacher_indices[k]) is not None:
            matrices += (address(classes, torch.int64), classes.shape[1], inputs.teacher_bucket[k])
        else:
            matrices += (0, 0, 0)

    divisor = 1.0
    if inputs.num_items is not None:
        divisor = inputs.num_items.item()
        check_num_items(divisor)
    elif options.reduction == "mean":
        # The kernel counts the rows.
        divisor = float("nan")

    per_row = options.reduction == "none"
    loss = torch.empty(n_rows if per_row else ())
    grad, grad_type = None, gradient_dtype(student)
    if need_grad and n_rows * n_classes * grad_type.itemsize >= _cpu.large_gradient:
        # Memory that the kernel keeps between calls: allocating new pages would take longer than the loss.
        grad = _cpu.gradient(n_rows, n_classes, _TYPES[grad_type])
    elif need_grad:
        grad = torch.empty(n_rows, n_classes, dtype=grad_type)
    stats = None
    if need_stats:
        stats = empty_stats(torch.empty, n_teachers, n_rows)

    fault = _cpu.loss(
        n_rows,
        n_classes,
        matrices,
        [options.temperature, *options.teacher_temperatures(n_teachers)],
        address(inputs.labels, torch.int64),
        address(inputs.teacher_prior),
        inputs.teacher_prior is not None and inputs.teacher_prior.dim() == 2,
        address(inputs.teacher_mask, torch.bool),
        address(inputs.sample_weight),
        native,
        divisor,
        0 if grad is None else grad.data_ptr(),
        _TYPES[grad_type],
        loss.data_ptr() if per_row else 0,
        *([0] * len(AMTSSStats._fields) if stats is None else [stat.data_ptr() for stat in stats]),
        0 if per_row else loss.data_ptr(),
        torch.get_num_threads(),
    )
    if fault is not None:
        which, index = fault
        if which == 1 and inputs.labels is not None:
            raise_label(int(inputs.labels[index]), index, n_classes, options)
        name = "teacher_prior" if which == 2 else "sample_weight"
        weight = getattr(inputs, name)
        raise_weight(name, float(weight.flatten()[index]))
    return LossOutputs(loss, grad, stats)


def _places(rows: list[Tensor | None], k: int, n_rows: int) -> Tensor | None:
    """[N] int32: for each row its place among the rows of teacher `k`, or -1; None: they are all rows."""
    if not rows or (own := rows[k]) is None:
        return None
    places = torch.full((n_rows,), -1, dtype=torch.int32)
    places[own] = torch.arange(len(own), dtype=torch.int32)
    return places
