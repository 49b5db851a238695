"""Teachers in 8 bits: the engines that run them, and loading that never holds a model twice.

Linear layers of the encoder and its word embeddings are kept in 8 bits; position embeddings, norms, pooler, projections
and classifier stay as they are, as they weigh little and speak last.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig
from transformers.activations import GELUActivation
from transformers.core_model_loading import ConversionOps
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from amtss_fast._system.memory import give_back
from amtss_fast.loss.backends import cpu
from amtss_fast.loss.logits import quantize_weight
from amtss_fast.teachers.int8 import kernels

ENGINES = ("native", "onednn", "bitsandbytes", "torchao")
"""`native` is this package's matrix product, for CPUs with AVX-512 VNNI; `onednn` is torch's own on x86 CPUs; the two
others are packages of that name."""


def why_missing(engine: str) -> str | None:
    """Why an engine of `ENGINES` cannot run here; None if it can."""
    if engine == "native":
        return cpu.why_missing() or (None if kernels.has_int8() else "it needs a CPU with AVX-512 VNNI")
    if engine == "onednn":
        if platform.machine() not in ("x86_64", "AMD64"):
            return f"it runs on x86-64 CPUs, this is {platform.machine()}"
        if "onednn" not in torch.backends.quantized.supported_engines:
            return "this build of torch lacks oneDNN's quantised operators"
        return None
    return None if find_spec(engine) else f"it is not installed: pip install {engine}"


def choose_engine(engine: str | None, device: torch.device) -> str:
    """The engine asked for, or the measured best: bitsandbytes on CUDA; on CPUs native, or onednn where it is missing.

    Raises:
        ValueError: an unknown engine, or one that does not run on this device.
        ImportError: an engine that is missing; the message says how to get it.
    """
    chosen = engine
    if chosen is None:
        on_cpu = "onednn" if why_missing("native") else "native"
        chosen = "bitsandbytes" if device.type == "cuda" else on_cpu
    if chosen not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}; got {engine!r}")
    if chosen in _LAYERS and device.type != "cpu":
        raise ValueError(f"engine {chosen!r} runs on the CPU, not on {device}")
    missing = why_missing(chosen)
    if missing is not None:
        raise ImportError(f"engine {chosen!r}: {missing}")
    return chosen


# Products of 8-bit codes: y[n] = step[n] * sum_i a[n, i] * scale * w[:, i] + bias, with a[n] = round(x[n] / step[n]).
# native: step[n] = (max(0, max x[n]) - min(0, min x[n])) / 255; onednn, which has one zero point for all rows:
# step[n] = max |x[n]| / 127.


class Int8Linear(nn.Module):
    """A linear layer for inference on the CPU: 8-bit activations, one step for each row; weights of 7 or 8 bits, one
    scale for each output. What a row gives does not depend on the other rows of its batch.
    """

    packed: Tensor
    offset: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(out_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    @staticmethod
    def largest_code() -> int:
        """Of the weights; the smallest is its negative."""
        raise NotImplementedError

    def pack(self) -> None:
        """Lays the codes out for the product, in their place. Before that the layer cannot run."""
        packed, offset = self._packed(self.weight.data)
        del self.weight
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("offset", offset, persistent=False)

    def _packed(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


_LIBRARY = torch.library.Library("amtss_fast", "FRAGMENT")


def _define(name: str, function: Callable[..., Tensor], more: str = "") -> None:
    """Makes an operator of a product, which `torch.compile` takes as it is."""
    _LIBRARY.define(f"{name}(Tensor x, Tensor packed, Tensor offset, Tensor scale, Tensor? bias{more}) -> Tensor")
    # Packed weights of oneDNN have a dispatch key of their own.
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")

    def shape(x: Tensor, packed: Tensor, offset: Tensor, scale: Tensor, bias: Tensor | None, *_: Any) -> Tensor:
        return x.new_empty((*x.shape[:-1], scale.shape[0]))

    torch.library.register_fake(f"amtss_fast::{name}", shape, lib=_LIBRARY)


class NativeLinear(Int8Linear):
    """By this package's kernel, with a GELU at the end if `gelu` is set."""

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
_LIBRARY.define("attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor")
_LIBRARY.impl("attention", kernels.attention, "CPU")


@torch.library.register_fake("amtss_fast::attention", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], q.shape[3]))


def _attention(
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
    """Attention as transformers asks for it: the native one where that knows how, else torch's."""
    tensors = (query, key, value)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    known = (
        query.shape[-1] % 32 == 0
        and value.shape == key.shape == (query.shape[0], query.shape[1], key.shape[2], query.shape[3])
        and all(t.dtype == torch.float32 and t.device.type == "cpu" and t.stride(-1) == 1 for t in tensors)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        and dropout == 0
        and kwargs.get("position_bias") is None
    )
    if attention_mask is None:
        known = known and not causal
    else:
        known = known and attention_mask.dtype == torch.bool and attention_mask.stride(-1) == 1
    if not known:
        output: Tensor = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )[0]
        return output, None
    run = torch.ops.amtss_fast.attention if torch.compiler.is_compiling() else kernels.attention
    return run(*tensors, attention_mask, query.shape[-1] ** -0.5 if scaling is None else scaling), None


ATTENTION = "amtss_fast"
"""The name of the native attention in transformers."""
AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def use_native(model: PreTrainedModel) -> None:
    """Lets a model with `NativeLinear` layers use the native attention, and the GELU at the end of a product."""
    encoder: Any = model.base_model.config
    heads = getattr(encoder, "num_attention_heads", 0)
    if encoder._attn_implementation == "sdpa" and heads and encoder.hidden_size // heads % 32 == 0:
        model.set_attn_implementation(ATTENTION)
    for module in model.modules():
        # As the encoders of BERT's kin name them.
        dense, activation = getattr(module, "dense", None), getattr(module, "intermediate_act_fn", None)
        if isinstance(dense, NativeLinear) and isinstance(activation, GELUActivation):
            dense.gelu = True
            module.intermediate_act_fn = nn.Identity()


class OneDNNLinear(Int8Linear):
    """By torch's product, which has one step for all rows: codes are made and results are scaled around it."""

    @staticmethod
    @cache
    def largest_code() -> int:
        """127 where this CPU adds products of 8-bit codes exactly, else 63.

        Without VNNI, oneDNN adds pairs of products in 16 bits and cuts them off at 32,767 in silence. Products of 255
        and 63 fit in pairs.
        """
        codes, weight = torch.full((64, 256), 255, dtype=torch.uint8), torch.full((64, 256), 127, dtype=torch.int8)
        one, zero = torch.ones(64), torch.zeros(64, dtype=torch.int64)
        packed = torch.ops.onednn.qlinear_prepack(weight, None)
        sums = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, 0, packed, one, zero, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return 127 if bool((sums == 255 * 127 * 256).all()) else 63

    def _packed(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.onednn.qlinear_prepack(codes, None), torch.zeros(len(codes), dtype=torch.int64)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = torch.ops.amtss_fast.int8_onednn(x, self.packed, self.offset, self.scale, self.bias)
        return output


def _onednn(x: Tensor, packed: Tensor, offset: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
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
        codes, 1.0, 128, packed, scale, offset, None, 1.0, 0, torch.float32, "none", [], ""
    )
    y = y.mul_(step) if bias is None else torch.addcmul(bias, y, step, out=y)
    return y.view(*x.shape[:-1], -1)


_define("int8_onednn", _onednn)

_LAYERS: dict[str, type[Int8Linear]] = {"native": NativeLinear, "onednn": OneDNNLinear}
"""Engines of this package, which share how a model is loaded."""
# The sums of products of 255 and 127 stay within 32 bits.
_MOST_INPUTS = 65_536


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
    # What quantising took lies between what it made.
    give_back()


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
        config = CPUConfig(engine, keep)
    # On CUDA bitsandbytes computes in float16 whatever it is given.
    dtype = torch.float16 if device.type == "cuda" and engine == "bitsandbytes" else torch.float32
    return {"quantization_config": config, "dtype": dtype, "device_map": {"": device}}


_METHOD = "amtss_fast_int8"


@register_quantization_config(_METHOD)
class CPUConfig(QuantizationConfigMixin):
    """Tells transformers to load a model with an engine's layers in place of its linear ones, but those in `keep`."""

    def __init__(self, engine: str, keep: list[str], **kwargs: Any) -> None:
        self.quant_method: Any = _METHOD
        self.engine = engine
        self.keep = keep


@register_quantizer(_METHOD)
class CPUQuantizer(HfQuantizer):
    """Quantises each weight when it is read, one at a time."""

    requires_calibration = False
    is_trainable = False
    quantization_config: CPUConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        keep = set(self.quantization_config.keep)
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and name not in keep and module.in_features <= _MOST_INPUTS:
                with torch.device("meta"):
                    layer = self._layer(module.in_features, module.out_features, module.bias is not None)
                model.set_submodule(name, layer)

    @property
    def _layer(self) -> type[Int8Linear]:
        return _LAYERS[self.quantization_config.engine]

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        parent, _, name = param_name.rpartition(".")
        return name == "weight" and isinstance(model.get_submodule(parent), Int8Linear)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self._layer.largest_code())

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for module in model.modules():
            if isinstance(module, Int8Linear):
                module.pack()
        if self._layer is NativeLinear:
            use_native(model)

    def is_serializable(self) -> bool:
        return False


class _Quantize(ConversionOps):
    def __init__(self, largest_code: int) -> None:
        self.largest_code = largest_code

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        quantised: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            weight = (value[0] if isinstance(value, list) else value).float()  # [out, in]
            scale = weight.abs().amax(-1).div_(self.largest_code)
            codes = (weight / scale.unsqueeze(-1)).nan_to_num_(0.0).round_().to(torch.int8)
            quantised[name] = nn.Parameter(codes, requires_grad=False)
            quantised[name.removesuffix("weight") + "scale"] = nn.Parameter(scale, requires_grad=False)
        return quantised
