"""What a backend of the loss gets and returns.

A backend is a module that satisfies :class:`Backend`. It imports nothing of this package but this file, `options`,
`checks` and `logits`; :mod:`amtss_fast.loss.registry` finds it and :mod:`amtss_fast.loss.ops` calls it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from amtss_fast.loss.options import LossOptions


class LossInputs(NamedTuple):
    """The tensors of one call, N rows, C classes, K teachers. Shapes, dtypes and devices have been checked."""

    student_logits: Tensor
    """[N, C] floating, any strides."""
    teacher_logits: list[Tensor]
    """K of [N, C], any strides: floating, or uint8 codes where the scales below are given. [N_k, C] for a teacher with
    rows of its own, [N, k] log-probabilities for one with indices."""
    teacher_row_max: list[Tensor | None]
    """K of [N] float32, None for a teacher without codes; an empty list where no teacher has codes."""
    teacher_step: list[Tensor | None]
    """As `teacher_row_max`: logit = row_max - step * code, -inf for code 255."""
    teacher_rows: list[Tensor | None]
    """K of [N_k] int64, ascending, the rows that a teacher's logits are of; None: all N. An empty list where no teacher
    has rows of its own."""
    teacher_indices: list[Tensor | None]
    """K of [N, k] int64, the classes of a teacher's log-probabilities (of any value where these are -inf); None for a
    teacher of dense logits. An empty list where all are."""
    teacher_bucket: list[bool]
    """Whether all classes outside of a teacher's indices are one class, with the rest of its mass; else they have none.
    As long as `teacher_indices`."""
    labels: Tensor | None
    """[N] int64."""
    teacher_prior: Tensor | None
    """[K] or [K, N] float32 or float64, >= 0."""
    teacher_mask: Tensor | None
    """[K, N] bool."""
    sample_weight: Tensor | None
    """[N] float32 or float64, >= 0."""
    num_items: Tensor | None
    """[] what divides the sum of a mean; None: the number of rows that count, at least 1."""


class AMTSSStats(NamedTuple):
    """Statistics of the rows, detached, in float32 (float64 for float64 logits). Rows that are ignored hold 0."""

    weights: Tensor
    """[K, N] importance of each teacher in each row; the weights of a row add up to 1 (0 without a teacher)."""
    margins: Tensor
    """[K, N] margin of each teacher; 0 where it does not teach."""
    kd: Tensor
    """[K, N] each teacher's own divergence in nats, without the factor temperature²; 0 where it does not teach."""
    student_margin: Tensor
    """[N] the student's margin of the same kind, at its temperature."""
    teacher_scale: Tensor
    """[K, N] standard deviation of a teacher's finite logits; 0 where it does not teach."""
    pull: Tensor
    """[K, N] weight_k sum_c |q[c] - p_k[c]|, how strongly a teacher pulls at the student; from 0 to 2."""


class LossOutputs(NamedTuple):
    """What a backend computes."""

    loss: Tensor
    """[], or [N] with reduction="none", in `accumulation_dtype`."""
    grad: Tensor | None
    """[N, C] contiguous, in `gradient_dtype`, of the reduced loss; None without `need_grad`."""
    stats: AMTSSStats | None
    """None without `need_stats`."""


class Backend(Protocol):
    """A module that computes the loss. Its formulas are those of :func:`amtss_fast.amtss_loss`."""

    @property
    def CHECKS_VALUES(self) -> bool:
        """Whether `amtss_loss` itself raises for values that are not allowed; if not, the operator checks them."""

    @property
    def scale_gradient(self) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
        """`scale_gradient(grad, factor, out)`: `grad` times the 0-d `factor`, written to `out`, which may be `grad`.

        It does not wait for the device to learn the factor. None: the operator multiplies.
        """

    def why_missing(self) -> str | None:
        """Why this machine cannot run the backend; None if it can."""

    def why_not(self, inputs: LossInputs, options: LossOptions) -> str | None:
        """Why the backend cannot run this call; None if it can. `inputs` may have no rows."""

    def amtss_loss(self, inputs: LossInputs, options: LossOptions, *, need_grad: bool, need_stats: bool) -> LossOutputs:
        """Loss, gradient and stats. Gives new tensors, none of them an input, and the same bits for the same inputs."""


def empty_stats(new: Callable[[tuple[int, ...]], Tensor], n_teachers: int, n_rows: int) -> AMTSSStats:
    """Memory for the stats from `new(shape)`."""
    shapes = [(n_rows,) if name == "student_margin" else (n_teachers, n_rows) for name in AMTSSStats._fields]
    return AMTSSStats(*[new(shape) for shape in shapes])


def accumulation_dtype(student_logits: Tensor) -> torch.dtype:
    """The dtype of sums, loss and stats: float32, or float64 where the student's logits are."""
    return torch.float64 if student_logits.dtype == torch.float64 else torch.float32


def gradient_dtype(student_logits: Tensor) -> torch.dtype:
    """The dtype of the saved gradient: the student's, but float32 for float16.

    A mean over many rows underflows in float16 before the factor of a GradScaler reaches it in the backward pass.
    """
    return torch.float32 if student_logits.dtype == torch.float16 else student_logits.dtype
