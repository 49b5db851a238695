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
from amtss_fast.loss.logits import TAILS, TopKLogprobs
from amtss_fast.loss.options import LossOptions


def check_logits(
    student_logits: Tensor,
    teachers: Sequence[Tensor],
    row_max: Sequence[Tensor | None],
    step: Sequence[Tensor | None],
    indices: Sequence[Tensor | None],
    rows: Sequence[Tensor | None],
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
    check_teacher_rows(rows, "student_logits", shape[0], device)
    for k, teacher in enumerate(teachers):
        if not isinstance(teacher, Tensor):
            raise TypeError(
                f"teacher_logits[{k}] must be a tensor, QuantizedLogits or TopKLogprobs, got {type(teacher).__name__}"
            )
        own = rows[k] if rows else None
        n_rows = shape[0] if own is None else len(own)
        if indices and indices[k] is not None:
            if len(teacher) != n_rows:
                raise ValueError(f"teacher_logits[{k}] has {len(teacher)} rows, {_of_rows(k, own)} {n_rows}")
            if teacher.shape[1] > shape[1]:
                raise ValueError(
                    f"teacher_logits[{k}] must list at most C = {shape[1]} classes in a row, got {teacher.shape[1]}"
                )
        elif own is None and teacher.shape != shape:
            raise ValueError(
                f"teacher_logits[{k}] has shape {list(teacher.shape)}, student_logits {list(shape)}: "
                "rows and classes must match"
            )
        elif teacher.shape != (n_rows, shape[1]):
            raise ValueError(
                f"teacher_logits[{k}] has shape {list(teacher.shape)}, but {_of_rows(k, own)} {n_rows} rows and "
                f"student_logits {shape[1]} classes"
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
            if quantized and (values := scales[k]) is not None:
                check_tensor(f"teacher_logits[{k}].{name}", values, "student_logits", device, [(n_rows,)])
                if not values.is_floating_point():
                    raise TypeError(f"teacher_logits[{k}].{name} must be floating, got {values.dtype}")


def _of_rows(k: int, own: Tensor | None) -> str:
    return "student_logits has" if own is None else f"teacher_rows[{k}]"


def check_top_k(name: str, teacher: TopKLogprobs) -> None:
    """Raise for a list of classes whose tensors do not fit each other."""
    indices, logprobs, tail = teacher
    check_quantized(name, {"indices": indices, "logprobs": logprobs})
    if logprobs.dim() != 2 or logprobs.shape[1] == 0:
        raise ValueError(f"{name}.logprobs must be [N, k] with k >= 1, got shape {list(logprobs.shape)}")
    if not logprobs.is_floating_point():
        raise TypeError(f"{name}.logprobs must be floating, got {logprobs.dtype}")
    check_tensor(f"{name}.indices", indices, f"{name}.logprobs", logprobs.device, [tuple(logprobs.shape)])
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}.indices must be int32 or int64, got {indices.dtype}")
    if tail not in TAILS:
        raise ValueError(f"{name}.tail must be one of {TAILS}, got {tail!r}")


def check_tails(argument: str, options: LossOptions, n_teachers: int, bucket: Sequence[bool]) -> None:
    """Raise ValueError for a temperature other than 1 where a teacher's tail is a bucket, or too few temperatures.

    `argument`: what holds the teachers.
    """
    temperatures = options.teacher_temperatures(n_teachers)
    for k, has_bucket in enumerate(bucket):
        for name, temperature in (("temperature", options.temperature), ("teacher_temperature", temperatures[k])):
            if has_bucket and temperature != 1:
                raise ValueError(
                    f'{name} must be 1 where {argument}[{k}] has tail="bucket", got {temperature}: the mass '
                    'outside of the list is unknown at another temperature; tail="renormalize" allows any'
                )


def unpack_teacher_rows(teacher_rows: Sequence[Tensor | None] | None, n_teachers: int) -> list[Tensor | None]:
    """A list with an entry for each teacher; empty if no teacher has rows of its own."""
    if teacher_rows is None:
        return []
    if not isinstance(teacher_rows, (list, tuple)):
        raise TypeError(
            f"teacher_rows must be a sequence with one entry for each teacher, got {type(teacher_rows).__name__}"
        )
    if len(teacher_rows) != n_teachers:
        raise ValueError(f"teacher_rows must hold one entry for each of {n_teachers} teachers, got {len(teacher_rows)}")
    return [] if all(rows is None for rows in teacher_rows) else list(teacher_rows)


def check_teacher_rows(rows: Sequence[Tensor | None], student: str, n_rows: int, device: torch.device) -> None:
    """Raise for rows of teachers that are no list of at most N rows; their values are checked apart."""
    for k, own in enumerate(rows):
        if own is None:
            continue
        name = f"teacher_rows[{k}]"
        if not isinstance(own, Tensor):
            raise TypeError(f"{name} must be a tensor or None, got {type(own).__name__}")
        if own.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {own.dtype}")
        if own.dim() != 1 or len(own) > n_rows:
            raise ValueError(f"{name} must be [N_k] with N_k <= {n_rows}, got shape {list(own.shape)}")
        if own.device != device:
            raise RuntimeError(f"{name} is on {own.device}, {student} on {device}: move one of them")


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


def check_teacher_values(argument: str, inputs: LossInputs) -> None:
    """Raise ValueError for wrong values of `teacher_rows`, and of lists in the `argument` of the teachers."""
    n_rows, n_classes = inputs.student_logits.shape
    check_row_values(inputs.teacher_rows, n_rows)
    for k, indices in enumerate(inputs.teacher_indices):
        if indices is not None:
            _check_listed(f"{argument}[{k}]", indices, inputs.teacher_logits[k], inputs.teacher_bucket[k], n_classes)


def check_row_values(rows: Sequence[Tensor | None], n_rows: int) -> None:
    """Raise ValueError unless the rows of each teacher are ascending, without repetition, from 0 to N - 1."""
    for k, own in enumerate(rows):
        if own is None or len(own) == 0:
            continue
        least, most = int(own[0]), int(own[-1])
        if least < 0 or most >= n_rows:
            raise ValueError(
                f"teacher_rows[{k}] must hold rows from 0 to {n_rows - 1}, found {least if least < 0 else most}"
            )
        if (wrong := own[1:] <= own[:-1]).any():
            i = int(wrong.nonzero()[0, 0])
            raise ValueError(
                f"teacher_rows[{k}] must be ascending without repetition, found {int(own[i])} before {int(own[i + 1])}"
            )


def _check_listed(name: str, indices: Tensor, logprobs: Tensor, bucket: bool, n_classes: int) -> None:
    listed = logprobs != float("-inf")
    wrong = listed & ((indices < 0) | (indices >= n_classes))
    if wrong.any():
        row, place = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{name}.indices[{row}, {place}] = {int(indices[row, place])} is no class from 0 to {n_classes - 1}"
        )
    # Entries of padding become different numbers that are no classes.
    padding = -1 - torch.arange(indices.shape[1], device=indices.device)
    ordered = indices.where(listed, padding).sort(-1).values
    twice = ordered[:, 1:] == ordered[:, :-1]
    if twice.any():
        row, place = twice.nonzero()[0].tolist()
        raise ValueError(f"{name}.indices lists class {int(ordered[row, place])} twice in row {row}")
    if bucket:
        mass = logprobs.double().exp().sum(-1)
        # Rounding to 8 bits changes a probability by up to 0.4 % of its logarithm.
        allowed = 1 + (1e-2 if logprobs.dtype == torch.bfloat16 else 1e-3)
        if (mass > allowed).any():
            row = int((mass > allowed).nonzero()[0, 0])
            raise ValueError(
                f"{name}.logprobs must be log-probabilities, but those of row {row} add up to a mass of "
                f"{float(mass[row]):.6g}, above {allowed}"
            )


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
