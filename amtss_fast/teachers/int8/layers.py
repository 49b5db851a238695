"""Linear layers of 8-bit codes for inference on the CPU, one class for each engine of this package.

    y[n] = step[n] * sum_i a[n, i] * scale * w[:, i] + bias,    a[n] = round(x[n] / step[n])

native: step[n] = (max(0, max x[n]) - min(0, min x[n])) / 255. onednn, which has one zero point for all rows:
step[n] = max |x[n]| / 127. The weights w are codes too, one scale for each output.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.activations import GELUActivation

from amtss_fast._compat.torch import onednn_linear, pack_onednn
from amtss_fast.teachers.int8 import kernels

MOST_INPUTS = 65_536
"""Up to this width the sum of products of 255 and 127 stays within 32 bits."""

_LIBRARY = torch.library.Library("amtss_fast", "FRAGMENT")


def _define(name: str, function: Callable[..., Tensor], more: str = "") -> None:
    """Registers a product as an operator, which `torch.compile` does not trace into."""
    _LIBRARY.define(f"{name}(Tensor x, Tensor packed, Tensor offset, Tensor scale, Tensor? bias{more}) -> Tensor")
    # Packed weights of oneDNN have a dispatch key of their own.
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")

    def shape(x: Tensor, packed: Tensor, offset: Tensor, scale: Tensor, bias: Tensor | None, *_: Any) -> Tensor:
        return x.new_empty((*x.shape[:-1], scale.shape[0]))

    torch.library.register_fake(f"amtss_fast::{name}", shape, lib=_LIBRARY)


class Int8Linear(nn.Module):
    """A linear layer with 8-bit activations, one step for each row, and weights of 7 or 8 bits, one scale for each
    output. A row's result does not depend on the other rows of its batch.

    `weight` holds int8 codes [out, in] and `scale` is float32 [out], until `pack` replaces the codes by the engine's
    own layout; `weight` is empty from then on.
    """

    packed: Tensor
    offset: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.in_features = in_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(out_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    @staticmethod
    def largest_code() -> int:
        """The largest code of the weights; the smallest is its negative."""
        raise NotImplementedError

    @classmethod
    def quantize(cls, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [out, in] int8 and their scale [out] float32 for a weight [out, in]."""
        weight = weight.float()
        scale = weight.abs().amax(-1).div_(cls.largest_code())
        # A row of zeros has scale 0 and codes 0, not NaN.
        return (weight / scale.unsqueeze(-1)).nan_to_num_(0.0).round_().to(torch.int8), scale

    def pack(self) -> None:
        """Replaces the codes by the layout that the product reads; the layer cannot run before."""
        packed, offset = self._packed(self.weight.data)
        del self.weight
        # Some models (T5) cast what enters a layer to the dtype of its weight; an empty one says it.
        self.register_buffer("weight", self.scale.new_empty(0, self.in_features), persistent=False)
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("offset", offset, persistent=False)

    def _packed(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class NativeLinear(Int8Linear):
    """The product of this package's kernel, with a GELU after it if `gelu` is set."""

    gelu = False

    @staticmethod
    def largest_code() -> int:
        return 127

    def _packed(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        outputs, inputs = codes.shape
        offset = codes.sum(1, dtype=torch.int32).neg_()
        padded = F.pad(codes, (0, -inputs % 4, 0, -outputs % 32))
        return padded.view(-(-outputs // 32), 32, -(-inputs // 4), 4).transpose(1, 2).contiguous(), offset

    def forward(self, x: Tensor) -> Tensor:
        # The dispatcher takes longer than a small product.
        run = torch.ops.amtss_fast.int8_native if torch.compiler.is_compiling() else kernels.int8_linear
        output: Tensor = run(x, self.packed, self.offset, self.scale, self.bias, self.gelu)
        return output


_define("int8_native", kernels.int8_linear, ", bool gelu")


def fuse_gelu(model: PreTrainedModel) -> None:
    """Moves the exact GELU after each feed-forward `NativeLinear` into that layer's product."""
    for module in model.modules():
        # The names in BERT and the encoders derived from it.
        dense, activation = getattr(module, "dense", None), getattr(module, "intermediate_act_fn", None)
        if isinstance(dense, NativeLinear) and isinstance(activation, GELUActivation):
            dense.gelu = True
            module.intermediate_act_fn = nn.Identity()


class OneDNNLinear(Int8Linear):
    """torch's product, which has one step for all rows: the codes are made before it, the rows are scaled after it."""

    @staticmethod
    @cache
    def largest_code() -> int:
        """127 where this CPU adds products of 8-bit codes exactly, else 63.

        Without VNNI, oneDNN adds pairs of products in 16 bits and silently cuts them off at 32,767. Pairs of products
        of 255 and 63 fit.
        """
        codes, weight = torch.full((64, 256), 255, dtype=torch.uint8), torch.full((64, 256), 127, dtype=torch.int8)
        one, zero = torch.ones(64), torch.zeros(64, dtype=torch.int64)
        sums = onednn_linear(codes, 0, pack_onednn(weight), one, zero)
        return 127 if bool((sums == 255 * 127 * 256).all()) else 63

    def _packed(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        return pack_onednn(codes), torch.zeros(len(codes), dtype=torch.int64)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = torch.ops.amtss_fast.int8_onednn(x, self.packed, self.offset, self.scale, self.bias)
        return output


def _int8_onednn(x: Tensor, packed: Tensor, offset: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])  # [N, in]
    # amax and amin are vectorized, aminmax is not.
    step = torch.maximum(rows.amax(-1, keepdim=True), rows.amin(-1, keepdim=True).neg_()).div_(127)
    # A row of zeros has codes 0, not NaN.
    step.clamp_(min=1e-30)
    inverse, codes = step.reciprocal(), torch.empty(rows.shape, dtype=torch.int8)
    # In blocks, so that the products stay in the cache. To int8, as the conversion to uint8 is not vectorized; flipping
    # the highest bit then adds 128.
    for part, by, to in zip(rows.split(256), inverse.split(256), codes.split(256), strict=True):
        to.copy_(torch.mul(part, by).round_())
    y = onednn_linear(codes.view(torch.uint8).bitwise_xor_(128), 128, packed, scale, offset)
    y = y.mul_(step) if bias is None else torch.addcmul(bias, y, step, out=y)
    return y.view(*x.shape[:-1], -1)


_define("int8_onednn", _int8_onednn)

LAYERS: dict[str, type[Int8Linear]] = {"native": NativeLinear, "onednn": OneDNNLinear}
"""The layer of each engine of this package."""
