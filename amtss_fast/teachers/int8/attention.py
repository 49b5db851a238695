"""The native attention of 8-bit teachers, registered with transformers under the name `ATTENTION`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from amtss_fast._compat.transformers import attention_implementation
from amtss_fast.teachers.int8 import kernels

ATTENTION = "amtss_fast"
"""The name of the native attention in transformers."""

_LIBRARY = torch.library.Library("amtss_fast", "FRAGMENT")
_LIBRARY.define("attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor")
_LIBRARY.impl("attention", kernels.attention, "CPU")


@torch.library.register_fake("amtss_fast::attention", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], q.shape[3]))


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: the native kernel where it computes the same, else torch's."""
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    plain = dropout == 0 and kwargs.get("position_bias") is None
    if not (plain and _fits_kernel(query, key, value) and _fits_mask(attention_mask, causal)):
        torchs: Any = AttentionInterface()["sdpa"]
        output: Tensor = torchs(module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs)[0]
        return output, None
    run = torch.ops.amtss_fast.attention if torch.compiler.is_compiling() else kernels.attention
    return run(query, key, value, attention_mask, query.shape[-1] ** -0.5 if scaling is None else scaling), None


def _fits_kernel(query: Tensor, key: Tensor, value: Tensor) -> bool:
    tensors = (query, key, value)
    batch, heads, _, width = query.shape
    return (
        width % 32 == 0
        and value.shape == key.shape == (batch, heads, key.shape[2], width)
        and all(t.dtype == torch.float32 and t.device.type == "cpu" and t.stride(-1) == 1 for t in tensors)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
    )


def _fits_mask(mask: Tensor | None, causal: bool) -> bool:
    return not causal if mask is None else mask.dtype == torch.bool and mask.stride(-1) == 1


AttentionInterface.register(ATTENTION, attention)
# The kernel reads the same boolean masks as torch's attention.
AttentionMaskInterface.register(ATTENTION, AttentionMaskInterface()["sdpa"])


def use_native_attention(model: PreTrainedModel) -> None:
    """Switches a model from torch's attention to the native one where its heads have a width that fits."""
    config: Any = model.base_model.config
    heads = getattr(config, "num_attention_heads", 0)
    if attention_implementation(config) == "sdpa" and heads and config.hidden_size // heads % 32 == 0:
        model.set_attn_implementation(ATTENTION)
