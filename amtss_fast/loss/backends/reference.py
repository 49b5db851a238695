"""The loss in plain torch, on any device, in float64 too; every other backend is tested against it.

It follows the formulas of :func:`amtss_fast.amtss_loss` line by line and is written to be read, not to be fast: it
holds several [N, C] temporaries per teacher.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from amtss_fast.loss.contract import AMTSSStats, LossInputs, LossOutputs, accumulation_dtype, gradient_dtype
from amtss_fast.loss.logits import dequantize
from amtss_fast.loss.options import LossOptions

CHECKS_VALUES = False
scale_gradient = None
_INF = float("inf")


def why_missing() -> str | None:
    """Plain torch is always there."""
    return None


def why_not(inputs: LossInputs, options: LossOptions) -> str | None:
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
    for k, rows in enumerate(inputs.teacher_rows):
        if rows is not None:
            teaches[k] &= torch.zeros_like(counts).index_fill(0, rows, True)
    row_weight = torch.ones(n_rows, dtype=dtype, device=device)
    if inputs.sample_weight is not None:
        row_weight = inputs.sample_weight.to(dtype)

    student = inputs.student_logits.to(dtype)
    log_q = _log_softmax(student, temperature)  # [N, C]
    teachers = [
        _compare(inputs, k, tau, log_q, labels, labeled, options)
        for k, tau in enumerate(options.teacher_temperatures(n_teachers))
    ]
    margins = torch.stack([t.margin for t in teachers]).where(teaches, 0.0)  # [K, N]
    divergences = torch.stack([t.divergence for t in teachers]).where(teaches, 0.0)
    weights = _weights(margins, prior, teaches, options.weight_temperature)

    row_loss = torch.zeros(n_rows, dtype=dtype, device=device)
    row_grad = torch.zeros_like(student)
    if options.kd_weight > 0:
        weighted = (weights * divergences).where(weights != 0, 0.0).sum(0)
        row_loss = row_loss + options.kd_weight * temperature**2 * weighted
        slope = torch.zeros_like(student)  # q G
        for teacher, weight in zip(teachers, weights, strict=True):
            column = weight.unsqueeze(-1)
            slope = slope + (column * teacher.slope).where(column != 0, 0.0)
        if options.divergence == "forward_kl":
            # The sum of q G is -1 exactly.
            total = -teaches.any(0).to(dtype).unsqueeze(-1)
        else:
            total = slope.sum(-1, keepdim=True)
        row_grad = row_grad + options.kd_weight * temperature * (slope - log_q.exp() * total)
        row_grad = row_grad.where(teaches.any(0).unsqueeze(-1), 0.0)
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
    stats = None
    if need_stats:
        student_margin = _margin(log_q, labels, labeled, options.weighting).where(counts, 0.0)
        scale = torch.stack([t.scale for t in teachers]).where(teaches, 0.0)
        pull = weights * torch.stack([t.distance for t in teachers])
        stats = AMTSSStats(weights, margins, divergences, student_margin, scale, pull.where(weights != 0, 0.0))
    return LossOutputs(loss, grad, stats)


class _Comparison(NamedTuple):
    """One teacher beside the student, in each of N rows."""

    margin: Tensor  # [N]
    divergence: Tensor  # [N] D(p, q)
    slope: Tensor  # [N, C] q dD/dq, up to a constant times q
    distance: Tensor  # [N] sum |q - p|
    scale: Tensor  # [N] standard deviation of the finite logits


def _compare(
    inputs: LossInputs,
    k: int,
    temperature: float,
    log_q: Tensor,
    labels: Tensor,
    labeled: Tensor,
    options: LossOptions,
) -> _Comparison:
    rows = inputs.teacher_rows[k] if inputs.teacher_rows else None
    indices = inputs.teacher_indices[k] if inputs.teacher_indices else None
    logits = _of_all_rows(_logits(inputs, k).to(log_q.dtype), rows, len(log_q))
    if indices is not None:
        indices = _of_all_rows(indices, rows, len(log_q))
        return _compare_top_k(logits, indices, inputs.teacher_bucket[k], temperature, log_q, labels, labeled, options)
    log_p = _log_softmax(logits, temperature)
    divergence, slope = _divergence(log_p, log_q, options)
    margin = _margin(log_p, labels, labeled, options.weighting)
    return _Comparison(margin, divergence.sum(-1), slope, _distance(log_p, log_q), _scale(logits))


def _compare_top_k(
    logprobs: Tensor,
    indices: Tensor,
    bucket: bool,
    temperature: float,
    log_q: Tensor,
    labels: Tensor,
    labeled: Tensor,
    options: LossOptions,
) -> _Comparison:
    """The listed classes, and all others as one more class at the end."""
    listed = logprobs != -_INF
    # An entry of padding stands for a class that does not exist.
    places = indices.where(listed, log_q.shape[1])  # [N, k]
    if bucket:
        log_p = logprobs
        mass = log_p.exp().sum(-1, keepdim=True)
        # Rounding may leave a rest where there is no class to have it, or less than none.
        has_rest = listed.sum(-1, keepdim=True) < log_q.shape[1]
        log_rest_p = torch.log1p(-mass.clamp(max=1.0)).where(has_rest, -_INF)
    else:
        log_p = _log_softmax(logprobs, temperature)
        log_rest_p = torch.full_like(log_p[:, :1], -_INF)
    padded_q = torch.cat([log_q, torch.full_like(log_q[:, :1], -_INF)], -1)  # [N, C + 1]
    rest_q = padded_q.scatter(-1, places, -_INF)
    log_rest_q = rest_q.logsumexp(-1, keepdim=True)
    log_p_all = torch.cat([log_p, log_rest_p], -1)  # [N, k + 1]
    log_q_all = torch.cat([padded_q.gather(-1, places), log_rest_q], -1)
    divergence, slope = _divergence(log_p_all, log_q_all, options)
    # The slope of the rest is shared out to its classes as their probability is.
    share = (rest_q - log_rest_q).exp().where(rest_q != -_INF, 0.0)
    spread = share * slope[:, -1:]
    spread = spread.where(share != 0, 0.0).scatter(-1, places, slope[:, :-1])[:, :-1]
    at_label = (places == labels.unsqueeze(-1)) & labeled.unsqueeze(-1)
    margin = _listed_margin(log_p, at_label, labeled, options.weighting)
    return _Comparison(margin, divergence.sum(-1), spread, _distance(log_p_all, log_q_all), _scale(logprobs))


def _listed_margin(log_p: Tensor, at_label: Tensor, labeled: Tensor, weighting: str) -> Tensor:
    """The margin [N] within the list; a label outside of it has the probability 0."""
    ranked = torch.cat([log_p, torch.full_like(log_p[:, :1], -_INF)], -1).topk(2, dim=-1).values
    largest, second = ranked.unbind(-1)
    if weighting == "top2_margin":
        return largest.exp() - second.exp()
    own = log_p.where(at_label, -_INF).amax(-1).where(labeled, largest)
    if weighting == "label_nll":
        return own
    other = log_p.where(~at_label, -_INF).amax(-1).where(labeled, second)
    return own.exp() - other.exp()


def _of_all_rows(values: Tensor, rows: Tensor | None, n_rows: int) -> Tensor:
    """[N, ...] of the values [N_k, ...] of `rows`; 0 in the others."""
    return values if rows is None else values.new_zeros(n_rows, *values.shape[1:]).index_copy(0, rows, values)


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
    log_p_other = log_p.scatter(-1, target, -_INF).amax(-1)
    return log_p_target.exp() - log_p_other.exp()


def _weights(margins: Tensor, prior: Tensor, teaches: Tensor, weight_temperature: float) -> Tensor:
    """Weights [K, N], w = alpha exp(m / beta) / sum over the teachers that teach the row; 0 for the others."""
    if weight_temperature == 0:
        # argmax takes the first of several equal ones: the lowest k. Teachers at -inf precede those that do not teach.
        score = margins.clamp(min=torch.finfo(margins.dtype).min).where(teaches, -_INF)
        best = torch.nn.functional.one_hot(score.argmax(0), margins.shape[0]).T  # [K, N]
        return best.to(margins.dtype).where(teaches, 0.0)
    # Numbers that float32 would round to 0 or infinity, as in the other backends.
    beta = max(weight_temperature, 1e-30)
    score = margins / beta if beta <= torch.finfo(torch.float32).max else torch.zeros_like(margins)
    score = score.where(teaches, -_INF)
    top = score.amax(0)
    # Equal scores differ by 0, also where both are -inf.
    mass = prior * (score - top).where(score != top, 0.0).exp()
    mass = mass.where(teaches, 0.0)
    return (mass / mass.sum(0)).where(teaches, 0.0)


def _divergence(log_p: Tensor, log_q: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    """The terms of D(p, q) [N, C], and the slope q dD/dq, up to a constant times q that is no part of a gradient.

    Terms of a probability 0 are 0. Where p and q are equal, both are exactly 0 (but for the forward KL, whose slope is
    -p).
    """
    p, q = log_p.exp(), log_q.exp()
    # The log-ratio, 0 where both are -inf.
    difference = (log_p - log_q).where(log_p != log_q, 0.0)
    if options.divergence == "forward_kl":
        return (p * difference).where(p != 0, 0.0), -p
    if options.divergence == "reverse_kl":
        term = -(q * difference).where(q != 0, 0.0)
        return term, term
    if options.divergence == "tvd":
        return 0.5 * (p - q).abs(), 0.5 * q * (q - p).sign()
    beta = options.divergence_beta
    assert beta is not None
    mixing = 1 - beta if options.divergence == "skew_reverse_kl" else beta
    # m = mixing p + (1 - mixing) q = max(p, q) x, and x is exactly 1 where p = q.
    below = difference <= 0
    ratio = (-difference.abs()).exp()  # min(p, q) / max(p, q)
    x = ((1 - mixing) + mixing * ratio).where(below, mixing + (1 - mixing) * ratio).where(ratio != 1, 1.0)
    log_p_m = difference.where(below, 0.0) - x.log()
    log_q_m = -difference.where(~below, 0.0) - x.log()
    p_term = (p * log_p_m).where(p != 0, 0.0)  # of KL(p || m)
    q_term = (q * log_q_m).where(q != 0, 0.0)  # of KL(q || m)
    if options.divergence == "jsd":
        return beta * p_term + (1 - beta) * q_term, (1 - beta) * q_term
    tilt = (p - q) * torch.ones_like(ratio).where(below, ratio) / x  # (p - q) q / m
    if options.divergence == "skew_forward_kl":
        return p_term, -((1 - beta) ** 2) * tilt
    return q_term, q_term + beta * (1 - beta) * tilt


def _distance(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_q.exp() - log_p.exp()).abs().sum(-1)


def _scale(logits: Tensor) -> Tensor:
    """The standard deviation of the finite logits of each row [N]; 0 where there are none."""
    masked = logits == -_INF
    count = (~masked).sum(-1).clamp(min=1)
    mean = logits.masked_fill(masked, 0.0).sum(-1) / count
    return ((logits - mean.unsqueeze(-1)).masked_fill(masked, 0.0).square().sum(-1) / count).sqrt()
