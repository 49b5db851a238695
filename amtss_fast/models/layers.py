"""Parts of the student: projection, pooling, and the choice of a language's output."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN


class LanguageProjection(nn.Linear):
    """h + act(W h + b), [*, H] to [*, H]; W = 0 and b = 0 make it the identity."""

    def __init__(self, size: int, activation: str) -> None:
        super().__init__(size, size)
        self.activation = ACT2FN[activation]

    def forward(self, hidden: Tensor) -> Tensor:
        projected: Tensor = hidden + self.activation(super().forward(hidden))
        return projected


def flush_left(attention_mask: Tensor, *inputs: Tensor | None) -> list[Tensor | None]:
    """The mask and other inputs, all [N, T], with each row's first attended token in the first column.

    Padding on the left becomes padding on the right; rows that begin with a token stay as they are. Encoders count
    positions from the first column, and the first token is what "cls" pools.
    """
    length = attention_mask.shape[1]
    start = attention_mask.int().argmax(1, keepdim=True)  # [N, 1]
    index = (torch.arange(length, device=attention_mask.device) + start) % length  # [N, T]
    return [None if values is None else values.gather(1, index) for values in (attention_mask, *inputs)]


def pool(hidden: Tensor, attention_mask: Tensor | None, pooling: str) -> Tensor:
    """[N, T, H] to [N, H]: the first token, or the mean over the attended tokens, which is 0 in a row without any."""
    if pooling == "cls":
        return hidden[:, 0]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if attention_mask is None:
        return hidden.mean(1, dtype=wide).to(hidden.dtype)
    attended = attention_mask.bool().unsqueeze(-1)  # [N, T, 1]
    total = hidden.masked_fill(~attended, 0).sum(1, dtype=wide)
    return (total / attended.sum(1).clamp(min=1)).to(hidden.dtype)


def of_language(outputs: Sequence[Tensor], language_ids: Tensor) -> Tensor:
    """For each row the output of its language: L tensors [N, D] and ids [N] to [N, D]."""
    stacked = torch.stack(list(outputs))  # [L, N, D]
    # gather refuses negative ids; indexing would count them from the end.
    index = language_ids.long().view(1, -1, 1).expand(1, -1, stacked.shape[-1])
    return stacked.gather(0, index).squeeze(0)


def mean_module(modules: Sequence[nn.Module]) -> nn.Module:
    """A trainable copy of the first module whose parameters are the mean over all; dtype and device are kept."""
    mean = copy.deepcopy(modules[0])
    for name, parameter in mean.named_parameters():
        values = torch.stack([module.get_parameter(name).detach() for module in modules])
        wide = torch.promote_types(values.dtype, torch.float32)
        parameter.data.copy_(values.to(wide).mean(0))
        parameter.grad = None
    return mean.requires_grad_(True)
