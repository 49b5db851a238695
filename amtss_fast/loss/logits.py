"""Kinds of teacher logits and heads beside plain tensors: 8-bit codes, log-probabilities of the top k classes."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

# Of the 256 codes one is kept for -inf.
_MASKED = 255
_LARGEST = 254
# Logits further below the largest of their row are raised to this distance. A smaller range would cut off classes that
# matter at high temperatures, a larger one would give coarser steps at temperature 1.
_RANGE = 66.0
Tail: TypeAlias = Literal["bucket", "renormalize"]
TAILS: tuple[str, ...] = get_args(Tail)
_LARGEST_SCALE = torch.finfo(torch.float32).max / 127 * (1 - 2**-23)


class QuantizedLogits(NamedTuple):
    """Logits [N, C] in 8 bits: logit = row_max - step * code, and -inf for code 255.

    Made by :func:`quantize_logits`; :func:`amtss_fast.amtss_loss` takes it in the place of a teacher's logits.
    """

    codes: Tensor
    """[N, C] uint8."""
    row_max: Tensor
    """[N] float32, the largest logit of each row."""
    step: Tensor
    """[N] float32, the distance between neighboring codes, >= 0."""

    def dequantize(self) -> Tensor:
        """The logits that the codes represent, [N, C] float32."""
        return dequantize(self.codes, self.row_max, self.step)

    def to(self, device: torch.device | str) -> QuantizedLogits:
        """The same on another device."""
        return QuantizedLogits(self.codes.to(device), self.row_max.to(device), self.step.to(device))


def quantize_logits(logits: Tensor) -> QuantizedLogits:
    """8-bit codes of `logits` for use in a softmax.

    Each row has its own step, its range (at most 66) divided by 254. For normally distributed logits of standard
    deviation 10, KL(softmax(logits / tau) || softmax(dequantized / tau)), averaged over rows, is below 1e-3 nats at
    every tau >= 1 and any number of classes up to 250,000; a single row, where two classes are nearly tied, reaches
    4e-3. At standard deviation 3 no row reaches 1e-3.

    Args:
        logits: [N, C] floating. -inf stays -inf; a row that holds NaN or +inf becomes NaN, as its softmax is.

    Raises:
        TypeError, ValueError: not floating, or not [N, C].
    """
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits must be a tensor, got {type(logits).__name__}")
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating, got {logits.dtype}")
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be [N, C] with C >= 1, got shape {list(logits.shape)}")
    values = logits.detach().float()
    row_max = values.amax(-1, keepdim=True)  # [N, 1]
    masked = values == float("-inf")
    below = (row_max - values).masked_fill(masked, 0.0)  # [N, C] distance from the maximum
    step = below.amax(-1, keepdim=True).clamp(max=_RANGE).nan_to_num(_RANGE) / _LARGEST
    # A row of equal logits has step 0 and code 0.
    codes = (below / step).round().nan_to_num(0.0).clamp(max=_LARGEST).masked_fill(masked, _MASKED)
    row_max = row_max.where(row_max != float("inf"), float("nan"))
    return QuantizedLogits(codes.to(torch.uint8), row_max.squeeze(-1), step.squeeze(-1))


def dequantize(codes: Tensor, row_max: Tensor, step: Tensor) -> Tensor:
    """Logits [N, C] float32 of `codes` [N, C] uint8: row_max[n] - step[n] * code, -inf for code 255."""
    values = row_max.unsqueeze(-1) - step.unsqueeze(-1) * codes
    return values.where(codes != _MASKED, float("-inf"))


class TopKLogprobs(NamedTuple):
    """The log-probabilities of k classes in each row, as inference servers give them; a teacher in place of logits.

    With `tail="bucket"` all other classes are one class that has the rest of the mass, for the teacher (1 - sum p_i)
    and for the student, and the divergence is over these k + 1 classes: it is never negative, and for k = C it is that
    of the dense logits. The rest at another temperature is unknown, so the temperatures of teacher and student must be
    1. With `tail="renormalize"` the teacher has no mass outside of the list, p = softmax(logprobs / tau).

    >>> teacher = TopKLogprobs(indices, logprobs)
    >>> loss = amtss_loss(student_logits, [teacher], labels, temperature=1.0)
    """

    indices: Tensor
    """[N, k] int32 or int64, the classes, in any order; no class twice in a row."""
    logprobs: Tensor
    """[N, k] floating, log p_i at temperature 1; -inf: no entry, whatever its index (padding)."""
    tail: Tail = "bucket"

    def to(self, device: torch.device | str) -> TopKLogprobs:
        """The same on another device."""
        return TopKLogprobs(self.indices.to(device), self.logprobs.to(device), self.tail)

    def half(self) -> TopKLogprobs:
        """The same in 6 bytes an entry, float16 and int32; down to e^-16 a probability changes by at most 0.8 %."""
        return TopKLogprobs(self.indices.int(), self.logprobs.half(), self.tail)


class QuantizedWeight(NamedTuple):
    """A matrix [C, H] in 8 bits, weight[c] = scale[c] * codes[c]: a frozen teacher's head.

    Made by :func:`quantize_weight`; :func:`amtss_fast.linear_amtss_loss` takes it in the place of a teacher's head.
    """

    codes: Tensor
    """[C, H] int8, -127 to 127."""
    scale: Tensor
    """[C] float32, >= 0."""

    def dequantize(self) -> Tensor:
        """The matrix that the codes represent, [C, H] float32."""
        return self.scale.unsqueeze(-1) * self.codes

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same on another device."""
        return QuantizedWeight(self.codes.to(device), self.scale.to(device))


def quantize_weight(weight: Tensor) -> QuantizedWeight:
    """8-bit codes of a head [C, H]; each class has its own scale, its largest magnitude / 127.

    An entry is off by half a scale at most: approximate, unlike bfloat16 or float32 heads.

    Raises:
        TypeError, ValueError: not floating, not [C, H], or not finite.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
    if not weight.is_floating_point():
        raise TypeError(f"weight must be floating, got {weight.dtype}")
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"weight must be [C, H] with C, H >= 1, got shape {list(weight.shape)}")
    if weight.is_meta:
        raise ValueError("weight must have values to be quantized, but it is on the device meta")
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), device=weight.device)
    # Blocks of classes: a head has gigabytes, and its float32 copy would have four times as many as the codes.
    for rows, codes_, scale_ in zip(weight.detach().split(4096), codes.split(4096), scale.split(4096), strict=True):
        values = rows.float()
        torch.div(values.abs().amax(-1), 127, out=scale_)
        if not scale_.isfinite().all():
            raise ValueError("weight must be finite to be quantized, found NaN or infinity")
        # 127 times the scale of the largest float32 would be rounded to infinity.
        scale_.clamp_(max=_LARGEST_SCALE)
        # A class of zeros has scale 0 and codes 0, as one whose scale is too small for a float32.
        codes_.copy_((values / scale_.unsqueeze(-1)).nan_to_num(0.0, 0.0, 0.0).round().clamp(-127, 127))
    return QuantizedWeight(codes, scale)
