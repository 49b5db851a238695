"""Errors for bad input: each names the argument, what was given and what is allowed.

The public functions check types, shapes and devices. The operators check values inside tensors, and only on devices
where reading them does not wait.
"""

from __future__ import annotations

import numbers
import os
from collections.abc import Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from amtss_fast.loss.contract import LossInputs
from amtss_fast.loss.options import LossOptions


def check_logits(
    student_logits: Tensor,
    teachers: Sequence[Tensor],
    row_max: Sequence[Tensor | None],
    step: Sequence[Tensor | None],
) -> None:
    """Raise for logits whose types, shapes or devices do not fit; see :func:`amtss_fast.amtss_loss`."""
    if not isinstance(student_logits, Tensor):
        raise TypeError(f"student_logits must be a tensor, got {type(student_logits).__name__}")
    if student_logits.dim() != 2:
        raise ValueError(
            f"student_logits must be [N, C], got shape {list(student_logits.shape)}; flatten [B, T, C] to [B * T, C]"
        )
    if not student_logits.is_floating_point():
        raise TypeError(f"student_logits must be floating, got {student_logits.dtype}")
    shape, device = student_logits.shape, student_logits.device
    if shape[1] < 2:
        raise ValueError(f"student_logits must have at least 2 classes, got C = {shape[1]}")
    if len(teachers) == 0:
        raise ValueError("teacher_logits must hold at least one teacher, got none")
    for k, teacher in enumerate(teachers):
        if not isinstance(teacher, Tensor):
            raise TypeError(f"teacher_logits[{k}] must be a tensor or QuantizedLogits, got {type(teacher).__name__}")
        if teacher.shape != shape:
            raise ValueError(
                f"teacher_logits[{k}] has shape {list(teacher.shape)}, student_logits {list(shape)}: "
                "rows and classes must match"
            )
        if teacher.device != device:
            raise RuntimeError(
                f"teacher_logits[{k}] is on {teacher.device}, student_logits on {device}: move one of them"
            )
        quantized = bool(row_max) and row_max[k] is not None
        if quantized and teacher.dtype != torch.uint8:
            raise TypeError(f"teacher_logits[{k}].codes must be uint8, got {teacher.dtype}")
        if not teacher.is_floating_point() and not quantized:
            raise TypeError(f"teacher_logits[{k}] must be floating or QuantizedLogits, got {teacher.dtype}")
    for name, scales in (("row_max", row_max), ("step", step)):
        for k, values in enumerate(scales):
            if values is not None:
                check_tensor(f"teacher_logits[{k}].{name}", values, "student_logits", device, [(shape[0],)])
                if not values.is_floating_point():
                    raise TypeError(f"teacher_logits[{k}].{name} must be floating, got {values.dtype}")


def check_quantized(name: str, fields: Mapping[str, object]) -> None:
    """Raise TypeError where a field of quantized logits or weights is no tensor."""
    for field, value in fields.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}.{field} must be a tensor, got {type(value).__name__}")


def check_special_labels(options: LossOptions, n_classes: int) -> None:
    """Raise ValueError where `ignore_index` or `unlabeled_index` is a class."""
    for name, index in (("ignore_index", options.ignore_index), ("unlabeled_index", options.unlabeled_index)):
        if 0 <= index < n_classes:
            raise ValueError(f"{name} must lie outside the classes 0 to {n_classes - 1}, got {index}")


def check_rows(
    student: str,
    labels: Tensor | None,
    teacher_prior: Tensor | None,
    teacher_mask: Tensor | None,
    sample_weight: Tensor | None,
    n_rows: int,
    n_teachers: int,
    device: torch.device,
) -> tuple[Tensor | None, Tensor | None]:
    """Raise for tensors that do not fit the N rows of the argument called `student`.

    Returns `teacher_prior` and `sample_weight` as the kernels take them.
    """
    if labels is not None:
        check_tensor("labels", labels, student, device, [(n_rows,)])
        if labels.dtype != torch.int64:
            raise TypeError(f"labels must be int64, got {labels.dtype}")
    if teacher_mask is not None:
        check_tensor("teacher_mask", teacher_mask, student, device, [(n_teachers, n_rows)])
        if teacher_mask.dtype != torch.bool:
            raise TypeError(f"teacher_mask must be bool, got {teacher_mask.dtype}")
    if teacher_prior is not None:
        check_tensor("teacher_prior", teacher_prior, student, device, [(n_teachers,), (n_teachers, n_rows)])
        teacher_prior = _as_weights("teacher_prior", teacher_prior)
    if sample_weight is not None:
        check_tensor("sample_weight", sample_weight, student, device, [(n_rows,)])
        sample_weight = _as_weights("sample_weight", sample_weight)
    return teacher_prior, sample_weight


def check_tensor(
    name: str, tensor: Tensor, student: str, device: torch.device, shapes: Sequence[tuple[int, ...]]
) -> None:
    """Raise unless `tensor` has one of the shapes and lies on the device of the argument called `student`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tuple(tensor.shape) not in shapes:
        allowed = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name} must have shape {allowed}, got {list(tensor.shape)}")
    if tensor.device != device:
        raise RuntimeError(f"{name} is on {tensor.device}, {student} on {device}: move one of them")


def _as_weights(name: str, weight: Tensor) -> Tensor:
    if not weight.is_floating_point():
        raise TypeError(f"{name} must be floating, got {weight.dtype}")
    return weight.detach() if weight.dtype in (torch.float32, torch.float64) else weight.detach().float()


def as_num_items(num_items: int | float | Tensor | None, reduction: str, device: torch.device) -> Tensor | None:
    """`num_items` as a 0-d float64 tensor on `device`; raises for what cannot divide a mean."""
    if num_items is None:
        return None
    if reduction != "mean":
        raise ValueError(f'num_items divides a mean: it needs reduction="mean", got {reduction!r}')
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items must be a number or a 0-d tensor, got shape {list(num_items.shape)}")
        if num_items.is_complex():
            raise TypeError(f"num_items must be real, got {num_items.dtype}")
        if num_items.is_meta and device.type != "meta":
            raise RuntimeError(f"num_items is on meta, without a value; the logits are on {device}")
        # Trainers count on the CPU or on the device of the labels; one number may cross over.
        return num_items.detach().reshape(()).to(device, torch.float64)
    if not isinstance(num_items, (int, float, numbers.Real)):
        raise TypeError(f"num_items must be a number or a 0-d tensor, got {num_items!r}")
    if not torch.compiler.is_compiling():
        check_num_items(num_items)
    return torch.full((), float(num_items), dtype=torch.float64, device=device)


def values_are_free(tensor: Tensor) -> bool:
    """Whether its values may be checked: on an accelerator, where that waits for it, only with AMTSS_DEBUG=1."""
    return tensor.device.type == "cpu" or os.environ.get("AMTSS_DEBUG") == "1"


def check_values(inputs: LossInputs, options: LossOptions) -> None:
    """Raise ValueError for values in tensors that are outside their range."""
    n_classes, labels, num_items = inputs.student_logits.shape[1], inputs.labels, inputs.num_items
    if labels is not None:
        special = (labels == options.ignore_index) | (labels == options.unlabeled_index)
        wrong = ((labels < 0) | (labels >= n_classes)) & ~special
        if wrong.any():
            row = int(wrong.nonzero()[0, 0])
            raise_label(int(labels[row]), row, n_classes, options)
    for name, weight in (("teacher_prior", inputs.teacher_prior), ("sample_weight", inputs.sample_weight)):
        if weight is not None:
            # Written so that NaN is wrong too.
            wrong = ~((weight >= 0) & (weight < float("inf")))
            if wrong.any():
                raise_weight(name, float(weight[wrong][0]))
    if num_items is not None:
        check_num_items(float(num_items))


def check_num_items(num_items: float) -> None:
    """Raise ValueError unless the sum of a loss can be divided by it."""
    # Its reciprocal is a factor of the gradient, in float32. NaN is in no range.
    if not 1e-30 <= num_items <= 1e30:
        raise ValueError(f"num_items must be positive and finite, in [1e-30, 1e30], got {num_items}")


def raise_label(label: int, row: int, n_classes: int, options: LossOptions) -> NoReturn:
    """The error for a label that is neither a class nor one of the two special values."""
    raise ValueError(
        f"labels[{row}] = {label} is not allowed: expected 0 to {n_classes - 1}, "
        f"{options.ignore_index} (ignore_index) or {options.unlabeled_index} (unlabeled_index)"
    )


def raise_weight(name: str, value: float) -> NoReturn:
    """The error for a negative or non-finite entry of a weight tensor."""
    raise ValueError(f"{name} must hold finite numbers >= 0, found {value}")
