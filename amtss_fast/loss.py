"""The public loss: `amtss_loss`, its module form `AMTSSLoss`, and the statistics that fall out of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from amtss_fast import ops
from amtss_fast.quantization import QuantizedLogits

Weighting: TypeAlias = Literal["label_margin", "top2_margin", "label_nll"]
Reduction: TypeAlias = Literal["mean", "sum", "none"]
TeacherLogits: TypeAlias = Tensor | QuantizedLogits | Sequence[Tensor | QuantizedLogits]

WEIGHTINGS = ("label_margin", "top2_margin", "label_nll")
REDUCTIONS = ("mean", "sum", "none")


class AMTSSStats(NamedTuple):
    """What the loss saw, detached, in float32 (float64 for float64 logits). Rows that are ignored hold 0."""

    weights: Tensor
    """[K, N] importance of each teacher in each row; the weights of a row add up to 1 (0 without a teacher)."""
    margins: Tensor
    """[K, N] margin of each teacher; 0 where it does not teach."""
    kd: Tensor
    """[K, N] each teacher's own KL(p_k || q) in nats, without the factor temperature²; 0 where it does not teach."""
    student_margin: Tensor
    """[N] the student's margin of the same kind, at the same temperature."""


def amtss_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    labels: Tensor | None = None,
    *,
    temperature: float = 2.0,
    weighting: Weighting = "label_margin",
    weight_temperature: float = 1.0,
    teacher_prior: Tensor | None = None,
    teacher_mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    unlabeled_index: int = -1,
    reduction: Reduction = "mean",
    num_items: int | float | Tensor | None = None,
    return_stats: bool = False,
    backend: str | None = None,
) -> Any:
    r"""Distil K teachers into one student, each row from its max-margin teachers.

    For each row, with :math:`q = \mathrm{softmax}(s/\tau)` and :math:`p_k = \mathrm{softmax}(t_k/\tau)`::

        m_k = p_k[y] - max over c != y of p_k[c]          weighting="label_margin"
            = p_k[largest] - p_k[second largest]          weighting="top2_margin"
            = log p_k[y]                                  weighting="label_nll"
        w_k = alpha_k exp(m_k / beta) / sum_j alpha_j exp(m_j / beta)
        KD  = tau² sum_k w_k KL(p_k || q)
        CE  = cross entropy of softmax(s) with y, label-smoothed
        loss of the row = sample_weight (kd_weight KD + ce_weight CE)

    Teachers and weights carry no gradient; the gradient of the student's logits is computed in the same pass.

    Args:
        student_logits: [N, C] float32, bfloat16, float16 or float64 (float64: reference backend only); N rows are
            samples or tokens.
        teacher_logits: [K, N, C], or a sequence of K tensors [N, C] (never copied into a stack), or
            :class:`QuantizedLogits` in their place. Each may have its own floating dtype.
        labels: [N] int64, or None for a batch without labels.
        temperature: tau > 0, of student and teachers.
        weighting: the margin that weighs the teachers, see above.
        weight_temperature: beta in [0, inf]. 0 takes only the max-margin teacher (of equal ones the first), inf takes
            no notice of the margins.
        teacher_prior: alpha, [K] or [K, N] float >= 0; 0 takes a teacher out. None: ones.
        teacher_mask: [K, N] bool; False: this teacher does not teach this row, and is not looked at. None: all True.
        sample_weight: r, [N] float >= 0; 0 takes a row out of the sum, but it still counts in the mean. None: ones.
        kd_weight, ce_weight: >= 0, not both 0; a term of weight 0 is not evaluated.
        label_smoothing: of the cross entropy, in [0, 1).
        ignore_index: rows with this label are dropped: no loss, no gradient, not counted.
        unlabeled_index: rows with this label have none: each teacher's own largest class stands for y in the margins,
            there is no cross entropy, and the row counts.
        reduction: "mean" over the rows that count, "sum", or "none" for the loss of each row, [N].
        num_items: divides the sum in place of the number of rows that count (for gradient accumulation and data
            parallelism); only with reduction="mean". A number or a 0-d tensor.
        return_stats: also return :class:`AMTSSStats`, at no second pass.
        backend: "cpu", "triton", "reference", or None for the best that runs these tensors.

    Returns:
        The loss, 0-d or [N], in float32 (float64 for float64 logits); with `return_stats` also the stats.

    Infinities and NaN: -inf is a masked class (a teacher's adds 0 where the student's is -inf too; a student's -inf
    where a teacher has mass gives a loss of +inf and a finite gradient). NaN, or a row that is -inf throughout, makes
    its own row NaN and no other. A row without a teacher keeps its cross entropy. Nothing is clamped.

    Raises:
        ValueError, TypeError: wrong rank, shape, dtype or value of an argument, named in the message. Values inside
            tensors are looked at on the CPU; on accelerators, where that would wait for the device, only with the
            environment variable AMTSS_DEBUG=1 (otherwise a row with an impossible label is NaN).
        RuntimeError: teachers on another device, or a backend that is missing or cannot run these tensors.

    Source: the idea is that of AMTSS (arXiv 2305.07928), max-margin teachers weighted by importance; its abstract
    fixes no formula, and the ones above are this library's own.
    """
    teachers, row_max, step = _unpack(teacher_logits)
    _check_logits(student_logits, teachers, row_max, step)
    n_rows, n_classes = student_logits.shape
    device = student_logits.device
    teacher_prior, sample_weight = check_rows(
        "student_logits", labels, teacher_prior, teacher_mask, sample_weight, n_rows, len(teachers), device
    )
    check_options(
        temperature=temperature,
        weighting=weighting,
        weight_temperature=weight_temperature,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        unlabeled_index=unlabeled_index,
        reduction=reduction,
    )
    check_special_labels(ignore_index, unlabeled_index, n_classes)

    loss, *stats = ops.run(
        student_logits,
        teachers,
        row_max,
        step,
        labels,
        teacher_prior,
        teacher_mask,
        sample_weight,
        as_num_items(num_items, reduction, device),
        float(temperature),
        weighting,
        float(weight_temperature),
        float(kd_weight),
        float(ce_weight),
        float(label_smoothing),
        ignore_index,
        unlabeled_index,
        reduction,
        need_stats=return_stats,
        backend=backend,
    )
    return (loss, AMTSSStats(*stats)) if return_stats else loss


class AMTSSLoss(nn.Module):
    """:func:`amtss_loss` as a module: the options are given once, the tensors with every call.

    >>> loss_fn = AMTSSLoss(temperature=2.0, ce_weight=0.5)
    >>> loss = loss_fn(student_logits, teacher_logits, labels)
    """

    def __init__(
        self,
        *,
        temperature: float = 2.0,
        weighting: Weighting = "label_margin",
        weight_temperature: float = 1.0,
        kd_weight: float = 1.0,
        ce_weight: float = 0.0,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        unlabeled_index: int = -1,
        reduction: Reduction = "mean",
        return_stats: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "temperature": temperature,
            "weighting": weighting,
            "weight_temperature": weight_temperature,
            "kd_weight": kd_weight,
            "ce_weight": ce_weight,
            "label_smoothing": label_smoothing,
            "ignore_index": ignore_index,
            "unlabeled_index": unlabeled_index,
            "reduction": reduction,
        }
        check_options(**self.options)
        self.options |= {"return_stats": return_stats, "backend": backend}

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: TeacherLogits,
        labels: Tensor | None = None,
        *,
        teacher_prior: Tensor | None = None,
        teacher_mask: Tensor | None = None,
        sample_weight: Tensor | None = None,
        num_items: int | float | Tensor | None = None,
    ) -> Any:
        """See :func:`amtss_loss`."""
        return amtss_loss(
            student_logits,
            teacher_logits,
            labels,
            teacher_prior=teacher_prior,
            teacher_mask=teacher_mask,
            sample_weight=sample_weight,
            num_items=num_items,
            **self.options,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def check_options(
    *,
    temperature: float,
    weighting: str,
    weight_temperature: float,
    kd_weight: float,
    ce_weight: float,
    label_smoothing: float,
    ignore_index: int = -100,
    unlabeled_index: int = -1,
    reduction: str = "mean",
) -> None:
    """Raise ValueError for an option of :func:`amtss_loss` that no tensor is needed to judge."""
    # Written so that NaN is wrong too.
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting must be one of {WEIGHTINGS}, got {weighting!r}")
    if not weight_temperature >= 0:
        raise ValueError(f"weight_temperature must be in [0, inf], got {weight_temperature}")
    for name, weight in (("kd_weight", kd_weight), ("ce_weight", ce_weight)):
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name} must be finite and >= 0, got {weight}")
    if kd_weight == 0 and ce_weight == 0:
        raise ValueError("kd_weight and ce_weight must not both be 0")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if ignore_index == unlabeled_index:
        raise ValueError(f"ignore_index and unlabeled_index must differ, both are {ignore_index}")


def _unpack(
    teacher_logits: TeacherLogits,
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor | None]]:
    """K tensors [N, C], and the two scales of each where one of them is quantised (else two empty lists)."""
    if isinstance(teacher_logits, Tensor):
        if teacher_logits.dim() != 3:
            raise ValueError(
                "teacher_logits must be [K, N, C] or a sequence of K tensors [N, C], "
                f"got one tensor of shape {list(teacher_logits.shape)}"
            )
        return list(teacher_logits.unbind(0)), [], []
    if isinstance(teacher_logits, QuantizedLogits):
        teacher_logits = [teacher_logits]
    if not isinstance(teacher_logits, (list, tuple)):
        raise TypeError(
            f"teacher_logits must be a tensor or a sequence of tensors, got {type(teacher_logits).__name__}"
        )
    if all(isinstance(t, Tensor) for t in teacher_logits):
        return list(teacher_logits), [], []
    quantized = [t if isinstance(t, QuantizedLogits) else None for t in teacher_logits]
    return (
        [t.codes if isinstance(t, QuantizedLogits) else t for t in teacher_logits],
        [None if t is None else t.row_max for t in quantized],
        [None if t is None else t.step for t in quantized],
    )


def _check_logits(
    student_logits: Tensor,
    teachers: Sequence[Tensor],
    row_max: Sequence[Tensor | None],
    step: Sequence[Tensor | None],
) -> None:
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
        if not teacher.is_floating_point() and not (row_max and row_max[k] is not None):
            raise TypeError(f"teacher_logits[{k}] must be floating or QuantizedLogits, got {teacher.dtype}")
    for name, scales in (("row_max", row_max), ("step", step)):
        for k, values in enumerate(scales):
            if values is not None:
                check_tensor(f"teacher_logits[{k}].{name}", values, "student_logits", device, [(shape[0],)])


def check_special_labels(ignore_index: int, unlabeled_index: int, n_classes: int) -> None:
    """Raise ValueError where one of them is a class."""
    for name, index in (("ignore_index", ignore_index), ("unlabeled_index", unlabeled_index)):
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
    if num_items is None:
        return None
    if reduction != "mean":
        raise ValueError(f'num_items divides a mean: it needs reduction="mean", got {reduction!r}')
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items must be a number or a 0-d tensor, got shape {list(num_items.shape)}")
        # Trainers count on the CPU or on the device of the labels; one number may cross over.
        return num_items.detach().reshape(()).to(device, torch.float64)
    if not num_items > 0:
        raise ValueError(f"num_items must be positive, got {num_items}")
    return torch.full((), num_items, dtype=torch.float64, device=device)
