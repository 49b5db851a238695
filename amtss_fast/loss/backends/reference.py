"""The loss in plain torch, on any device, in float64 too; every other backend is tested against it.

It follows the formulas of :func:`amtss_fast.amtss_loss` line by line and is written to be read, not to be fast: it
holds several [N, C] temporaries per teacher.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from amtss_fast.loss.contract import AMTSSStats, LossInputs, LossOutputs, accumulation_dtype, gradient_dtype
from amtss_fast.loss.logits import dequantize
from amtss_fast.loss.options import LossOptions

CHECKS_VALUES = False
scale_gradient = None


def why_missing() -> str | None:
    """Plain torch is always there."""
    return None


def why_not(student_logits: Tensor, teacher_logits: Sequence[Tensor]) -> str | None:
    """Every device and every floating dtype runs."""
    return None


def amtss_loss(inputs: LossInputs, options: LossOptions, *, need_grad: bool, need_stats: bool) -> LossOutputs:
    """See :class:`amtss_fast.loss.contract.Backend`."""
    temperature, smoothing = options.temperature, options.label_smoothing
    dtype = accumulation_dtype(inputs.student_logits)
    n_rows, n_classes = inputs.student_logits.shape
    n_teachers = len(inputs.teacher_logits)
    device = inputs.student_logits.device

    labels = inputs.labels
    if labels is None:
        labels = torch.full((n_rows,), options.unlabeled_index, device=device)
    counts = labels != options.ignore_index  # [N]
    unlabeled = labels == options.unlabeled_index
    invalid = counts & ~unlabeled & ((labels < 0) | (labels >= n_classes))
    labeled = counts & ~unlabeled & ~invalid

    prior = torch.ones(n_teachers, 1, dtype=dtype, device=device)
    if inputs.teacher_prior is not None:
        prior = inputs.teacher_prior.to(dtype).reshape(n_teachers, -1)
    teaches = (prior > 0) & counts  # [K, N]
    if inputs.teacher_mask is not None:
        teaches = teaches & inputs.teacher_mask
    row_weight = torch.ones(n_rows, dtype=dtype, device=device)
    if inputs.sample_weight is not None:
        row_weight = inputs.sample_weight.to(dtype)

    student = inputs.student_logits.to(dtype)
    log_q = _log_softmax(student, temperature)  # [N, C]
    log_p = [_log_softmax(_logits(inputs, k).to(dtype), temperature) for k in range(n_teachers)]  # K of [N, C]

    margins = torch.stack([_margin(lp, labels, labeled, options.weighting) for lp in log_p])  # [K, N]
    margins = margins.where(teaches, 0.0)
    weights = _weights(margins, prior, teaches, options.weight_temperature)
    divergences = torch.stack([_divergence(lp, log_q) for lp in log_p])  # [K, N]
    divergences = divergences.where(teaches, 0.0)

    row_loss = torch.zeros(n_rows, dtype=dtype, device=device)
    row_grad = torch.zeros_like(student)
    if options.kd_weight > 0:
        weighted = (weights * divergences).where(weights != 0, 0.0).sum(0)
        row_loss = row_loss + options.kd_weight * temperature**2 * weighted
        mixture = torch.zeros_like(student)
        for lp, weight in zip(log_p, weights, strict=True):
            column = weight.unsqueeze(-1)
            mixture = mixture + (column * lp.exp()).where(column != 0, 0.0)
        taught = teaches.any(0).unsqueeze(-1)
        row_grad = row_grad + options.kd_weight * temperature * (log_q.exp() - mixture).where(taught, 0.0)
    if options.ce_weight > 0:
        log_q1 = student.log_softmax(-1)  # temperature 1
        target = labels.where(labeled, 0).unsqueeze(-1)
        cross_entropy = -(1 - smoothing) * log_q1.gather(-1, target).squeeze(-1)
        if smoothing > 0:
            cross_entropy = cross_entropy - smoothing * log_q1.mean(-1)
        row_loss = row_loss + options.ce_weight * cross_entropy.where(labeled, 0.0)
        one_hot = torch.zeros_like(student).scatter(-1, target, 1.0 - smoothing)
        smoothed = one_hot + smoothing / n_classes
        row_grad = row_grad + options.ce_weight * (log_q1.exp() - smoothed).where(labeled.unsqueeze(-1), 0.0)

    row_loss = row_loss.where(~invalid, float("nan"))
    row_grad = row_grad.where(~invalid.unsqueeze(-1), float("nan"))
    # A row of weight 0 is left out explicitly, because 0 times NaN is NaN.
    alive = counts & (row_weight > 0)
    row_loss = (row_weight * row_loss).where(alive, 0.0)
    row_grad = (row_weight.unsqueeze(-1) * row_grad).where(alive.unsqueeze(-1), 0.0)

    loss = row_loss
    if options.reduction == "sum":
        loss = row_loss.sum()
    elif options.reduction == "mean":
        divisor = counts.sum().clamp(min=1).to(dtype) if inputs.num_items is None else inputs.num_items.to(dtype)
        loss = row_loss.sum() / divisor
        row_grad = row_grad / divisor

    grad = row_grad.to(gradient_dtype(inputs.student_logits)) if need_grad else None
    student_margin = _margin(log_q, labels, labeled, options.weighting).where(counts, 0.0)
    stats = AMTSSStats(weights, margins, divergences, student_margin) if need_stats else None
    return LossOutputs(loss, grad, stats)


def _logits(inputs: LossInputs, k: int) -> Tensor:
    row_max = inputs.teacher_row_max[k] if inputs.teacher_row_max else None
    step = inputs.teacher_step[k] if inputs.teacher_step else None
    if row_max is None or step is None:
        return inputs.teacher_logits[k]
    return dequantize(inputs.teacher_logits[k], row_max, step)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    if temperature < 1:
        # Otherwise the quotient of a large logit would be infinite.
        logits = logits - logits.amax(-1, keepdim=True)
    return (logits / temperature).log_softmax(-1)


def _margin(log_p: Tensor, labels: Tensor, labeled: Tensor, weighting: str) -> Tensor:
    """The margin of a model in each row [N]; in rows without a label the model's own largest class is the label."""
    if weighting == "top2_margin":
        largest, second = log_p.topk(2, dim=-1).values.exp().unbind(-1)
        return largest - second
    target = labels.where(labeled, log_p.argmax(-1)).unsqueeze(-1)  # [N, 1]
    log_p_target = log_p.gather(-1, target).squeeze(-1)
    if weighting == "label_nll":
        return log_p_target
    log_p_other = log_p.scatter(-1, target, float("-inf")).amax(-1)
    return log_p_target.exp() - log_p_other.exp()


def _weights(margins: Tensor, prior: Tensor, teaches: Tensor, weight_temperature: float) -> Tensor:
    """Weights [K, N], w = alpha exp(m / beta) / sum over the teachers that teach the row; 0 for the others."""
    if weight_temperature == 0:
        # argmax takes the first of several equal ones: the lowest k. Teachers at -inf precede those that do not teach.
        score = margins.clamp(min=torch.finfo(margins.dtype).min).where(teaches, float("-inf"))
        best = torch.nn.functional.one_hot(score.argmax(0), margins.shape[0]).T  # [K, N]
        return best.to(margins.dtype).where(teaches, 0.0)
    # Numbers that float32 would round to 0 or infinity, as in the other backends.
    beta = max(weight_temperature, 1e-30)
    score = margins / beta if beta <= torch.finfo(torch.float32).max else torch.zeros_like(margins)
    score = score.where(teaches, float("-inf"))
    top = score.amax(0)
    # Equal scores differ by 0, also where both are -inf.
    mass = prior * (score - top).where(score != top, 0.0).exp()
    mass = mass.where(teaches, 0.0)
    return (mass / mass.sum(0)).where(teaches, 0.0)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) [N] with 0 log 0 = 0, where q is 0 too."""
    p = log_p.exp()
    return (p * (log_p - log_q)).where(p != 0, 0.0).sum(-1)
