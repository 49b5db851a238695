"""The public loss from hidden states and heads, `linear_amtss_loss`: no logits are ever held beyond a chunk of rows."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from typing_extensions import Unpack

from amtss_fast.loss import linear_ops
from amtss_fast.loss.checks import (
    as_num_items,
    check_quantized,
    check_rows,
    check_special_labels,
    check_tails,
    check_teacher_rows,
    check_tensor,
    check_top_k,
    unpack_teacher_rows,
)
from amtss_fast.loss.linear_compute import LinearInputs, Scalings
from amtss_fast.loss.logits import QuantizedWeight, TopKLogprobs
from amtss_fast.loss.options import LossKeywords, make_options, shows_options

TeacherHidden: TypeAlias = Tensor | TopKLogprobs | Sequence[Tensor | TopKLogprobs]
TeacherWeight: TypeAlias = Tensor | QuantizedWeight | Sequence[Tensor | QuantizedWeight | None]

LEAST_SCALE, LARGEST_SCALE = 1e-12, 1e12
"""Of scales and caps: their squares and quotients are float32 numbers that are neither 0 nor infinite."""


@shows_options
def linear_amtss_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: TeacherHidden,
    teacher_weight: TeacherWeight,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Sequence[Tensor | None] | Tensor | None = None,
    student_scale: float | None = None,
    student_softcap: float | None = None,
    teacher_scale: float | Sequence[float | None] | None = None,
    teacher_softcap: float | Sequence[float | None] | None = None,
    chunk_rows: int | None = None,
    teacher_rows: Sequence[Tensor | None] | None = None,
    teacher_prior: Tensor | None = None,
    teacher_mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
    return_stats: bool = False,
    backend: str | None = None,
    **options: Unpack[LossKeywords],
) -> Any:
    """:func:`amtss_loss` of the logits of heads, hidden @ weight.T + bias, computed for a chunk of rows at a time.

    For the heads of language models: 2,048 tokens of three teachers and a student over 250,002 classes are 8 GB of
    logits, here 0.3. The loss, the stats and the gradients of `student_hidden`, `student_weight` and `student_bias` are
    those of :func:`amtss_loss` after the products; only what requires a gradient gets one, and the head's is summed in
    float32. Rows with the label `ignore_index` are left out of the products; on the CPU the products of a teacher also
    leave out the rows that it does not teach.

    Args:
        student_hidden: [N, H] float32, bfloat16, float16 or float64 (float64: reference backend only); N rows are
            tokens.
        student_weight: [C, H] floating, the head; it may be the embedding.
        teacher_hidden: [K, N, H], or a sequence of K tensors [N, H_k], each of its own width and floating dtype, or
            :class:`~amtss_fast.TopKLogprobs` in their place: of such a teacher no logits are made.
        teacher_weight: [K, C, H], or a sequence of K heads [C_k, H_k]: floating tensors, or
            :class:`~amtss_fast.QuantizedWeight` (approximate), or None for TopKLogprobs. Classes are those of the
            student: the ones that a teacher lacks are -inf to it, the ones beyond the student's (padding of the
            vocabulary) are left out.
        labels: [N] int64, or None for a batch without labels.
        student_bias: [C] floating, or None.
        teacher_bias: None, or for each teacher [C_k] floating or None.
        student_scale, student_softcap: what the student does to its logits, in [1e-12, 1e12]. They are
            softcap * tanh(scale * (hidden @ weight.T + bias) / softcap), and the gradients are those through it. None:
            a scale of 1, no cap.
        teacher_scale, teacher_softcap: the same of the teachers: a number, or for each teacher a number or None.
        chunk_rows: rows whose logits are held at a time, C numbers each for the student, for its gradient and for each
            teacher that teaches the row. None: as many as fit into 128 MiB, but 64 at least (1 GiB and 128 rows on an
            accelerator).
        teacher_rows: for each teacher the rows [N_k] that it teaches, as of :func:`amtss_loss`. Teacher k then has
            hidden states [N_k, H_k], and only these rows enter products.
        All other keywords: as of :func:`amtss_loss`. With reduction="none" the backward pass computes the logits a
            second time.

    On the CPU the products are in float32 for every dtype of hidden states and heads (in float64 for float64); heads
    are converted block by block. On an accelerator they are in the dtype of the hidden states, gradients are summed in
    float32, and the call waits for the device once, to learn which rows are ignored, and once more with `teacher_rows`.
    The same call gives the same bits; another number of threads may give other bits, as in any matrix product.

    Returns, infinities, NaN: as of :func:`amtss_loss`.

    Raises:
        ValueError, TypeError: wrong rank, shape, dtype or value of an argument, named in the message.
        RuntimeError: tensors on different devices, or a backend that is missing or cannot run them.
    """
    chosen = make_options(options)
    _check_student(student_hidden, student_weight, student_bias)
    n_rows, n_classes, device = len(student_hidden), len(student_weight), student_hidden.device
    teachers = _unpack(teacher_hidden, teacher_weight, teacher_bias)
    n_teachers = len(teachers.hidden)
    rows = unpack_teacher_rows(teacher_rows, n_teachers)
    check_teacher_rows(rows, "student_hidden", n_rows, device)
    for k in range(n_teachers):
        _check_teacher(k, teachers, rows[k] if rows else None, student_hidden, n_classes)
    teacher_prior, sample_weight = check_rows(
        "student_hidden", labels, teacher_prior, teacher_mask, sample_weight, n_rows, n_teachers, device
    )
    check_special_labels(chosen, n_classes)
    check_tails("teacher_hidden", chosen, n_teachers, teachers.bucket)
    _check_chunk_rows(chunk_rows)

    scalings = Scalings(
        _positive("student_scale", student_scale, 1.0),
        _positive("student_softcap", student_softcap, math.inf),
        _positive_of_each("teacher_scale", teacher_scale, teachers.weight, 1.0),
        _positive_of_each("teacher_softcap", teacher_softcap, teachers.weight, math.inf),
    )
    inputs = LinearInputs(
        student_hidden,
        student_weight,
        student_bias,
        teachers.hidden,
        teachers.weight,
        teachers.code_scale,
        teachers.bias,
        rows,
        teachers.indices,
        teachers.bucket,
        labels,
        teacher_prior,
        teacher_mask,
        sample_weight,
        as_num_items(num_items, chosen.reduction, device),
    )
    loss, stats = linear_ops.run(
        inputs, chosen, scalings, chunk_rows=chunk_rows, need_stats=return_stats, backend=backend
    )
    return (loss, stats) if return_stats else loss


def _check_student(hidden: Any, weight: Any, bias: Any) -> None:
    _check_matrix("student_hidden", hidden, hidden)
    _check_matrix("student_weight", weight, hidden)
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"student_weight has shape {list(weight.shape)}, student_hidden {list(hidden.shape)}: "
            "both must have H columns"
        )
    if len(weight) < 2:
        raise ValueError(f"student_weight must have at least 2 classes, got C = {len(weight)}")
    _check_bias("student_bias", bias, len(weight), hidden.device)


def _check_chunk_rows(chunk_rows: Any) -> None:
    if chunk_rows is not None and not isinstance(chunk_rows, int):
        raise TypeError(f"chunk_rows must be an integer or None, got {chunk_rows!r}")
    if chunk_rows is not None and not 1 <= chunk_rows < 2**63:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")


class _Teachers(NamedTuple):
    """K of each, without gradient; the fields of :class:`~amtss_fast.loss.linear_compute.LinearInputs`."""

    hidden: list[Tensor]
    weight: list[Tensor | None]
    code_scale: list[Tensor | None]
    bias: list[Tensor | None]
    indices: list[Tensor | None]
    bucket: list[bool]


def _unpack(
    teacher_hidden: TeacherHidden,
    teacher_weight: TeacherWeight,
    teacher_bias: Sequence[Tensor | None] | Tensor | None,
) -> _Teachers:
    hidden = _sequence("teacher_hidden", teacher_hidden, 3)
    weight = _sequence("teacher_weight", teacher_weight, 3)
    bias = [None] * len(hidden) if teacher_bias is None else _sequence("teacher_bias", teacher_bias, 2)
    if not hidden:
        raise ValueError("teacher_hidden must hold at least one teacher, got none")
    for name, values in (("teacher_weight", weight), ("teacher_bias", bias)):
        if len(values) != len(hidden):
            raise ValueError(f"{name} must hold one entry for each of {len(hidden)} teachers, got {len(values)}")
    code_scale: list[Tensor | None] = [None] * len(hidden)
    indices, bucket = code_scale.copy(), [False] * len(hidden)
    for k, (teacher, head) in enumerate(zip(hidden, weight, strict=True)):
        if isinstance(head, QuantizedWeight):
            check_quantized(f"teacher_weight[{k}]", head._asdict())
            weight[k], code_scale[k] = head
        if isinstance(teacher, TopKLogprobs):
            check_top_k(f"teacher_hidden[{k}]", teacher)
            _check_headless(k, {"teacher_weight": head, "teacher_bias": bias[k]})
            hidden[k], indices[k], bucket[k] = teacher.logprobs, teacher.indices.long(), teacher.tail == "bucket"
    listed = any(own is not None for own in indices)
    return _Teachers(
        _detached(hidden),
        _detached(weight),
        code_scale,
        _detached(bias),
        indices if listed else [],
        bucket if listed else [],
    )


def _check_headless(k: int, given: dict[str, Any]) -> None:
    for name, value in given.items():
        if value is not None:
            raise TypeError(
                f"{name}[{k}] must be None where teacher_hidden[{k}] is TopKLogprobs, got {type(value).__name__}"
            )


def _check_teacher(k: int, teachers: _Teachers, rows: Tensor | None, student_hidden: Tensor, n_classes: int) -> None:
    hidden, weight, code_scale = teachers.hidden[k], teachers.weight[k], teachers.code_scale[k]
    _check_matrix(f"teacher_hidden[{k}]", hidden, student_hidden)
    n_rows, of = (len(student_hidden), "student_hidden") if rows is None else (len(rows), f"teacher_rows[{k}]")
    if len(hidden) != n_rows:
        raise ValueError(f"teacher_hidden[{k}] has {len(hidden)} rows, {of} {n_rows}")
    if teachers.indices and teachers.indices[k] is not None:
        if hidden.shape[1] > n_classes:
            raise ValueError(
                f"teacher_hidden[{k}] must list at most C = {n_classes} classes in a row, got {hidden.shape[1]}"
            )
        return
    _check_matrix(f"teacher_weight[{k}]", weight, student_hidden, quantized=code_scale is not None)
    assert weight is not None
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"teacher_weight[{k}] has shape {list(weight.shape)}, teacher_hidden[{k}] "
            f"{list(hidden.shape)}: both must have H_k columns"
        )
    if len(weight) == 0:
        raise ValueError(f"teacher_weight[{k}] must have at least 1 class, got shape {list(weight.shape)}")
    _check_bias(f"teacher_weight[{k}].scale", code_scale, len(weight), student_hidden.device)
    _check_bias(f"teacher_bias[{k}]", teachers.bias[k], len(weight), student_hidden.device)


def _sequence(name: str, value: Any, stacked: int) -> list[Any]:
    if isinstance(value, Tensor):
        if value.dim() != stacked:
            raise ValueError(
                f"{name} must be a sequence with one entry for each teacher or one tensor of {stacked} dimensions, "
                f"got shape {list(value.shape)}"
            )
        return list(value.unbind(0))
    if isinstance(value, (QuantizedWeight, TopKLogprobs)):
        return [value]
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a tensor or a sequence of tensors, got {type(value).__name__}")
    return list(value)


def _positive(name: str, value: Any, default: float) -> float:
    if value is None:
        return default
    is_number = isinstance(value, numbers.Real)
    if not is_number:
        raise TypeError(f"{name} must be a number or None, got {value!r}")
    # Written so that NaN is wrong too.
    if not LEAST_SCALE <= value <= LARGEST_SCALE:
        raise ValueError(f"{name} must be in [{LEAST_SCALE}, {LARGEST_SCALE}], got {value}")
    return float(value)


def _positive_of_each(name: str, values: Any, heads: list[Tensor | None], default: float) -> list[float]:
    if not isinstance(values, (list, tuple)):
        return [_positive(name, values, default)] * len(heads)
    if len(values) != len(heads):
        raise ValueError(f"{name} must be a number or hold one for each of {len(heads)} teachers, got {len(values)}")
    for k, head in enumerate(heads):
        if head is None:
            _check_headless(k, {name: values[k]})
    return [_positive(f"{name}[{k}]", value, default) for k, value in enumerate(values)]


def _detached(values: list[Any]) -> list[Any]:
    return [value.detach() if isinstance(value, Tensor) else value for value in values]


def _check_matrix(name: str, matrix: Any, student_hidden: Tensor, quantized: bool = False) -> None:
    if not isinstance(matrix, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(matrix).__name__}")
    if matrix.dim() != 2:
        raise ValueError(f"{name} must have 2 dimensions, got shape {list(matrix.shape)}")
    if quantized and matrix.dtype != torch.int8:
        raise TypeError(f"{name}.codes must be int8, got {matrix.dtype}")
    if not quantized and not matrix.is_floating_point():
        raise TypeError(f"{name} must be floating, got {matrix.dtype}")
    if matrix.device != student_hidden.device:
        raise RuntimeError(f"{name} is on {matrix.device}, student_hidden on {student_hidden.device}: move one of them")


def _check_bias(name: str, bias: Tensor | None, n_classes: int, device: torch.device) -> None:
    if bias is None:
        return
    check_tensor(name, bias, "student_hidden", device, [(n_classes,)])
    if not bias.is_floating_point():
        raise TypeError(f"{name} must be floating, got {bias.dtype}")
