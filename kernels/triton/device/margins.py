"""Margins of rows, and the softmax over teachers that weighs them."""

import triton
import triton.language as tl

from .bits import in_bits
from .memory import across, columns_of

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def margin_label(target, WEIGHTING: tl.constexpr):
    """The label of a row's margin; -1: the class of the largest logit."""
    if WEIGHTING == "top2_margin":
        target = target * 0 - 1
    return target


@triton.jit
def stand_out(x, start, target):
    """The largest logit, the own logit of the margin (the label's, or the largest), and the largest other one.

    If a chunk does not contain the label of its row, the own logit is -inf.
    """
    if len(x.shape) == 2:
        top = tl.max(x, 0)
        own, rest = stand_out_of_rows(x, top, start, target)
    elif target >= 0:
        if (target >= start) & (target < start + x.shape[0]):
            chosen = columns_of(x, start) == target
            own = tl.max(tl.where(chosen, x, float("-inf")), 0)
            rest = tl.max(tl.where(chosen, float("-inf"), x), 0)
        else:
            rest = tl.max(x, 0)
            own = tl.full((), float("-inf"), tl.float32)
        top = tl.maximum(own, rest)
    else:
        top = tl.max(x, 0)
        chosen = x == top
        rest = tl.max(tl.where(chosen, float("-inf"), x), 0)
        rest = tl.where(tl.sum(chosen.to(tl.int32), 0) > 1, top, rest)
        own = top
    return top, own, rest


@triton.jit
def stand_out_of_rows(x, top, start, target):
    """The own and the largest other logit of :func:`stand_out`, for rows of which only some have a label."""
    labeled = target >= 0
    chosen = tl.where(across(labeled), columns_of(x, start) == across(target), x == across(top))
    rest = tl.max(tl.where(chosen, float("-inf"), x), 0)
    # `rest` is never larger than `top`, but the compiler cannot see that. So it computes `chosen` again instead of
    # holding it in a register for each logit. Without this, the loss alone of float32 tiles of 64 x 16 spills 8 bytes
    # on sm_100, and with strided logits and all outputs they take 205 registers in place of 170 on sm_90.
    never = rest > top
    top = tl.where(never, rest, top)
    target = tl.where(never, target + 1, target)
    chosen = tl.where(across(labeled), columns_of(x, start) == across(target), x == across(top))
    # One sum gives the label's logit, or counts how often the largest logit occurs.
    answer = tl.sum(tl.where(chosen, tl.where(across(labeled), x, 1.0), 0.0), 0)
    own = tl.where(labeled, answer, top)
    return own, tl.where(labeled | (answer == 1), rest, top)


@triton.jit
def margin_of(own, rest, top, total, inverse, exponent, WEIGHTING: tl.constexpr):
    """The margin, from logits, of which `top` is the largest, the sum `total` of exp2 of their bits, and 1 / total."""
    if WEIGHTING == "label_nll":
        margin = (in_bits(own, top, exponent) - tl.log2(total)) * LN2
    else:
        margin = (tl.exp2(in_bits(own, top, exponent)) - tl.exp2(in_bits(rest, top, exponent))) * inverse
    return margin


@triton.jit
def spread_of(x, top):
    """Count, mean less `top`, and sum of squares about the mean, of the logits that are not -inf."""
    finite = x != float("-inf")
    x = tl.where(finite, x - across(top), 0.0)
    count = tl.sum(finite.to(tl.float32), 0)
    mean = tl.sum(x, 0) / tl.maximum(count, 1.0)
    apart = tl.where(finite, x - across(mean), 0.0)
    return count, mean, tl.sum(apart * apart, 0)


@triton.jit
def distance_of(b, inverse_s, a, inverse):
    """The distance sum |q - p| of two softmaxes, from logits in bits and 1 / the sums of their exponentials."""
    return tl.sum(tl.abs(tl.exp2(b) * across(inverse_s) - tl.exp2(a) * across(inverse)), 0)


@triton.jit
def admit(margin, alpha, kl, best, mass, divergence, sharpness, CHOICE: tl.constexpr):
    """One step of the softmax over teachers, which adds a teacher with its margin, prior `alpha` and `kl`.

    Returns its share, the factor `keep` of all earlier shares, the best score so far, and the sums `mass` of the shares
    and `divergence` of share * kl. Shares are relative to the best score. Equal scores differ by 0, also at -inf.
    """
    if CHOICE == "hard":
        # Of equal margins, the first wins.
        wins = (alpha > 0) & ((mass == 0) | (margin > best))
        share = tl.where(wins, 1.0, 0.0)
        keep = 1.0 - share
        best = tl.where(wins, margin, best)
        # Comparisons with NaN are false, so a NaN margin is passed on here.
        share = tl.where((alpha > 0) & (margin != margin), margin, share)
    else:
        score = alpha * 0
        if CHOICE == "soft":
            score = margin * sharpness
        higher = tl.where(alpha > 0, tl.maximum(best, score), best)
        share = alpha * tl.exp(tl.where(score == higher, 0.0, score - higher))
        share = tl.where(alpha > 0, share, 0.0)
        keep = tl.exp(tl.where(best == higher, 0.0, best - higher))
        best = higher
    mass = mass * keep + share
    # A teacher with weight 0 must not count, even if its divergence is infinite.
    divergence = tl.where(keep == 0, 0.0, divergence * keep) + tl.where(share == 0, 0.0, share * kl)
    return share, keep, best, mass, divergence
