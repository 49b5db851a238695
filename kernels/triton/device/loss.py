"""The loss of rows and its gradient, from sums of their logits. Logits are in bits: b = (s - top) * exponent."""

import triton
import triton.language as tl

from .margins import LN2
from .total import read_divisor


@triton.jit
def divergence_of(relative, total_q, total_p):
    """KL(p || q) in nats, from relative = sum p (a - b), and the sums of exp2(b) and exp2(a).

    Their logarithms would be large and cancel.
    """
    return LN2 * (relative + tl.log2(total_q / total_p))


@triton.jit
def distillation_loss(divergence, inverse, kd_weight, temperature):
    """kd_weight temperature^2 times the weighted mean of the divergences; `inverse`: 1 / the sum of their weights."""
    return tl.where(kd_weight > 0, kd_weight * temperature * temperature * divergence * inverse, 0.0)


@triton.jit
def cross_entropy(total, at_label, mean, label_smoothing):
    """The cross entropy in bits, of the label's logit and the mean logit, with total = sum exp2(logits)."""
    loss = (1 - label_smoothing) * (tl.log2(total) - at_label)
    return loss + tl.where(label_smoothing > 0, label_smoothing * (tl.log2(total) - mean), 0.0)


@triton.jit
def cross_entropy_gradient(b, columns, target, q_factor, target_factor, temperature, label_smoothing, n_classes):
    """exp2(b temperature) q_factor less the smoothed target times target_factor.

    `b` is a tile; values of rows have shapes that broadcast with it.
    """
    smoothed = tl.where(columns == target, 1 - label_smoothing, 0.0) + label_smoothing / n_classes
    return tl.exp2(b * temperature) * q_factor - target_factor * smoothed


@triton.jit
def gradient_factor(weight, invalid, divisor, n_rows, ignore_index):
    """Of each row: its weight over the divisor; NaN for an impossible label."""
    factor = tl.where(invalid, float("nan"), weight)
    if divisor is not None:
        factor = factor / read_divisor(divisor, n_rows, ignore_index)
    return factor


@triton.jit
def weighted_loss(loss, weight, alive, invalid):
    """Of each row: its weight times its loss, 0 if it is not alive; NaN for an impossible label."""
    loss = tl.where(invalid, float("nan"), loss)
    return tl.where(alive, weight * loss, 0.0)
