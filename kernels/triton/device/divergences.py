"""The divergences D(p, q) of a teacher p and the student q, and their slopes q dD/dq."""

import triton
import triton.language as tl

from .margins import LN2


@triton.jit
def compare(a, b, p, q, log_ratio, mixing, unmixing, DIVERGENCE: tl.constexpr):
    """The terms of D(p, q) in nats, and its slopes up to a constant times q. Equal p and q give exact zeros.

    `a`, `b`: logits of teacher and student in bits; `log_ratio`: log2 Z of the student less that of the teacher. Ratios
    come from them, because probabilities may be 0 in float32. m = mixing p + unmixing q.
    """
    if DIVERGENCE == "tvd":
        apart = q - p
        # NaN stays.
        sign = tl.where(apart > 0, 1.0, tl.where(apart < 0, -1.0, apart))
        term = 0.5 * tl.abs(apart)
        slope = 0.5 * q * sign
    else:
        difference = tl.where(tl.maximum(a, b) == float("-inf"), 0.0, (a - b) + log_ratio)
        if DIVERGENCE == "reverse_kl":
            term = tl.where(q == 0, 0.0, -LN2 * difference * q)
            slope = term
        else:
            term, slope = compare_with_mixture(difference, p, q, mixing, unmixing, DIVERGENCE)
    return term, slope


@triton.jit
def compare_with_mixture(difference, p, q, mixing, unmixing, DIVERGENCE: tl.constexpr):
    """:func:`compare` for a divergence from the mixture m; difference = log2(p / q)."""
    below = difference <= 0
    # m = max(p, q) x, and x is exactly 1 where p = q.
    ratio = tl.exp2(-tl.abs(difference))
    x = tl.where(below, unmixing + mixing * ratio, mixing + unmixing * ratio)
    x = tl.where(ratio == 1, 1.0, x)
    log_x = tl.log2(x)
    p_term = tl.where(p == 0, 0.0, LN2 * (tl.where(below, difference, 0.0) - log_x) * p)
    q_term = tl.where(q == 0, 0.0, LN2 * (tl.where(below, 0.0, -difference) - log_x) * q)
    tilt = (p - q) * tl.where(below, 1.0, ratio) / x  # (p - q) q / m
    if DIVERGENCE == "jsd":
        term = mixing * p_term + unmixing * q_term
        slope = unmixing * q_term
    elif DIVERGENCE == "skew_forward_kl":
        term = p_term
        slope = -unmixing * unmixing * tilt
    else:
        tl.static_assert(DIVERGENCE == "skew_reverse_kl")
        term = q_term
        slope = q_term + mixing * unmixing * tilt
    return term, slope
