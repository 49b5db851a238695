"""Teachers in 8 bits: the engines that run them, and loading that never holds a model twice.

Linear layers of the encoder and its word embeddings are kept in 8 bits; position embeddings, norms, pooler, projections
and classifier stay as they are, as they weigh little and speak last.
"""

from __future__ import annotations

import amtss_fast.training_extra  # noqa: F401

# isort: split
import platform
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from amtss_fast.quantization import quantize_weight

ENGINES = ("onednn", "bitsandbytes", "torchao")
"""`onednn` is torch's own 8-bit matrix product on x86 CPUs, the two others are packages of that name."""


def why_missing(engine: str) -> str | None:
    """Why an engine of `ENGINES` cannot run here; None if it can."""
    if engine == "onednn":
        if platform.machine() not in ("x86_64", "AMD64"):
            return f"it runs on x86-64 CPUs, this is {platform.machine()}"
        if "onednn" not in torch.backends.quantized.supported_engines:
            return "this build of torch lacks oneDNN's quantised operators"
        return None
    return None if find_spec(engine) else f"it is not installed: pip install {engine}"


def choose_engine(engine: str | None, device: torch.device) -> str:
    """The engine asked for, or the measured best: bitsandbytes on CUDA, onednn on CPUs.

    Raises:
        ValueError: an unknown engine, or one that does not run on this device.
        ImportError: an engine that is missing; the message says how to get it.
    """
    chosen = ("bitsandbytes" if device.type == "cuda" else "onednn") if engine is None else engine
    if chosen not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}; got {engine!r}")
    if chosen == "onednn" and device.type != "cpu":
        raise ValueError(f"engine 'onednn' runs on the CPU, not on {device}")
    missing = why_missing(chosen)
    if missing is not None:
        raise ImportError(f"engine {chosen!r}: {missing}")
    return chosen


# The product of 8-bit codes.

_LIBRARY = torch.library.Library("amtss_fast", "FRAGMENT")
_LIBRARY.define("int8_linear(Tensor x, Tensor packed, Tensor scale, Tensor zero, Tensor? bias) -> Tensor")


# Packed weights have a dispatch key of their own.
@torch.library.impl(_LIBRARY, "int8_linear", "CompositeExplicitAutograd")
def _int8_linear(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None) -> Tensor:
    """y[n] = step[n] * sum_i a[n, i] * scale * w[:, i] + bias with codes a of x, one step for each row of x."""
    rows = x.reshape(-1, x.shape[-1])  # [N, in]
    # amax and amin are vectorised, aminmax is not.
    step = torch.maximum(rows.amax(-1, keepdim=True), rows.amin(-1, keepdim=True).neg_()).div_(127)
    # A row of zeros has codes 0, not NaN.
    step.clamp_(min=1e-30)
    inverse, codes = step.reciprocal(), torch.empty(rows.shape, dtype=torch.int8)
    # In blocks, so that the products stay in the cache. To int8 and not to uint8, which is not vectorised either;
    # flipping the highest bit adds 128.
    for part, by, to in zip(rows.split(256), inverse.split(256), codes.split(256), strict=True):
        to.copy_(torch.mul(part, by).round_())
    codes = codes.view(torch.uint8).bitwise_xor_(128)
    y = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, 128, packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
    )
    y = y.mul_(step) if bias is None else torch.addcmul(bias, y, step, out=y)
    return y.view(*x.shape[:-1], -1)


@torch.library.register_fake("amtss_fast::int8_linear", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], scale.shape[0]))


@cache
def largest_code() -> int:
    """127 where this CPU adds products of 8-bit codes exactly, else 63.

    Without VNNI, oneDNN adds pairs of products in 16 bits and cuts them off at 32,767 in silence. Products of 255 and
    63 fit in pairs.
    """
    codes, weight = torch.full((64, 256), 255, dtype=torch.uint8), torch.full((64, 256), 127, dtype=torch.int8)
    one, zero = torch.ones(64), torch.zeros(64, dtype=torch.int64)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    sums = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, 0, packed, one, zero, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return 127 if bool((sums == 255 * 127 * 256).all()) else 63


class Int8Linear(nn.Module):
    """A linear layer for inference on the CPU: 8-bit activations, one step for each row; weights of 7 or 8 bits, one
    scale for each output. What a row gives does not depend on the other rows of its batch.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(out_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def pack(self) -> None:
        """Lays the codes out for the product, in their place. Before that the layer cannot run."""
        packed = torch.ops.onednn.qlinear_prepack(self.weight.data, None)
        del self.weight
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("zero", torch.zeros(len(self.scale), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = torch.ops.amtss_fast.int8_linear(x, self.packed, self.scale, self.zero, self.bias)
        return output


class Int8Embedding(nn.Module):
    """An embedding of which each row is 8-bit codes and a scale; its vectors come in `dtype`."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        codes, scale = quantize_weight(embedding.weight)
        self.weight = nn.Parameter(codes, requires_grad=False)  # [V, H] int8
        self.scale = nn.Parameter(scale, requires_grad=False)  # [V] float32
        self.padding_idx = embedding.padding_idx
        self.dtype = embedding.weight.dtype

    def forward(self, ids: Tensor) -> Tensor:
        return (F.embedding(ids, self.weight) * self.scale[ids].unsqueeze(-1)).to(self.dtype)


# Loading.


def kept_layers(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers that stay as they are: all outside the encoder, and its pooler."""
    inside = f"{model.base_model_prefix}." if model.base_model is not model else ""
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    if not inside:
        return names[-1:]
    return [name for name in names if not name.startswith(inside) or "pooler" in name]


def quantize_embedding(model: PreTrainedModel) -> None:
    """Replaces the word embeddings, where they are an ordinary `nn.Embedding`, by `Int8Embedding`."""
    words = model.get_input_embeddings()
    if type(words) is nn.Embedding:
        name = next(name for name, module in model.named_modules() if module is words)
        model.set_submodule(name, Int8Embedding(words))


def leave_file(model: PreTrainedModel) -> None:
    """Copies the weights that stayed as they are, where they are views of the mapped checkpoint: a single one keeps all
    of it in memory, float32 weights that are not used any more included.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def loading_options(engine: str, device: torch.device, model: PreTrainedModel) -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantise each layer as it is read.

    `model`: the model without its weights, on the meta device.
    """
    keep = kept_layers(model)
    config: QuantizationConfigMixin
    if engine == "bitsandbytes":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=keep)
    elif engine == "torchao":
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig

        config = TorchAoConfig(Int8DynamicActivationInt8WeightConfig(), modules_to_not_convert=keep)
    else:
        config = OneDNNConfig(keep)
    # On CUDA bitsandbytes computes in float16 whatever it is given.
    dtype = torch.float16 if device.type == "cuda" and engine == "bitsandbytes" else torch.float32
    return {"quantization_config": config, "dtype": dtype, "device_map": {"": device}}


_METHOD = "amtss_fast_onednn"


@register_quantization_config(_METHOD)
class OneDNNConfig(QuantizationConfigMixin):
    """Tells transformers to load a model with `Int8Linear` in place of its linear layers, but those in `keep`."""

    def __init__(self, keep: list[str], **kwargs: Any) -> None:
        self.quant_method: Any = _METHOD
        self.keep = keep


@register_quantizer(_METHOD)
class OneDNNQuantizer(HfQuantizer):
    """Quantises each weight when it is read, one at a time."""

    requires_calibration = False
    is_trainable = False
    quantization_config: OneDNNConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        keep = set(self.quantization_config.keep)
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and name not in keep:
                with torch.device("meta"):
                    layer = Int8Linear(module.in_features, module.out_features, module.bias is not None)
                model.set_submodule(name, layer)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        parent, _, name = param_name.rpartition(".")
        return name == "weight" and isinstance(model.get_submodule(parent), Int8Linear)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize()

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for module in model.modules():
            if isinstance(module, Int8Linear):
                module.pack()

    def is_serializable(self) -> bool:
        return False


class _Quantize(ConversionOps):
    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        quantised: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            weight = (value[0] if isinstance(value, list) else value).float()  # [out, in]
            scale = weight.abs().amax(-1).div_(largest_code())
            codes = (weight / scale.unsqueeze(-1)).nan_to_num_(0.0).round_().to(torch.int8)
            quantised[name] = nn.Parameter(codes, requires_grad=False)
            quantised[name.removesuffix("weight") + "scale"] = nn.Parameter(scale, requires_grad=False)
        return quantised
