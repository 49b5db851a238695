"""Loading of 8-bit teachers: each weight is quantized as it is read, so that one is held in float32 at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from amtss_fast._system.memory import give_back
from amtss_fast.errors import UserError
from amtss_fast.teachers.int8.attention import use_native_attention
from amtss_fast.teachers.int8.layers import LAYERS, MOST_INPUTS, Int8Linear, NativeLinear, fuse_gelu


def loading_options(engine: str, device: torch.device, model: PreTrainedModel) -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantize each layer as it is read.

    Args:
        engine: one of `ENGINES` that runs here.
        device: where the teacher will be.
        model: the model without its weights, on the meta device.
    """
    # On CUDA bitsandbytes computes in float16, whatever dtype it is given.
    dtype = torch.float16 if device.type == "cuda" and engine == "bitsandbytes" else torch.float32
    return {"quantization_config": _config(engine, _kept_layers(model)), "dtype": dtype, "device_map": {"": device}}


def _config(engine: str, keep: list[str]) -> Any:
    if engine == "bitsandbytes":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=keep)
    if engine == "torchao":
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig

        return TorchAoConfig(Int8DynamicActivationInt8WeightConfig(), modules_to_not_convert=keep)
    # An older transformers cannot import it.
    from amtss_fast._compat.loading import replacing_weights

    return replacing_weights(Quantization(LAYERS[engine], keep))


def share_in_8_bits(model: PreTrainedModel, what: str) -> float:
    """The share of a model's weights that is kept in 8 bits: of linear layers and word embeddings.

    Args:
        model: without its weights, on the meta device.
        what: what messages call it.

    Raises:
        UserError: no layer at all; the message names the model's class.
    """
    keep = set(_kept_layers(model))
    layers = [
        module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name not in keep and module.in_features <= MOST_INPUTS
    ]
    if not layers:
        raise UserError(
            f"{what}: a {type(model).__name__} has no linear layer that int8 could replace; use float32 or bfloat16"
        )
    words = model.get_input_embeddings()
    reached = {id(module.weight): module.weight.numel() for module in layers}
    if type(words) is nn.Embedding:
        reached[id(words.weight)] = words.weight.numel()
    return sum(reached.values()) / max(1, sum(parameter.numel() for parameter in model.parameters()))


def _kept_layers(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers that stay as they are: all outside the encoder, and its pooler."""
    inside = f"{model.base_model_prefix}." if model.base_model is not model else ""
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    if not inside:
        return names[-1:]
    return [name for name in names if not name.startswith(inside) or "pooler" in name]


class Quantization:
    """Puts layers of 8-bit codes in the place of a model's linear ones, but those in `keep`, as the model is read."""

    def __init__(self, layer: type[Int8Linear], keep: list[str]) -> None:
        self._layer = layer
        self._keep = frozenset(keep)

    def prepare(self, model: PreTrainedModel) -> None:
        """Replaces the layers, on the meta device."""
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and name not in self._keep and module.in_features <= MOST_INPUTS:
                with torch.device("meta"):
                    layer = self._layer(module.in_features, module.out_features, module.bias is not None)
                model.set_submodule(name, layer)

    def replaces(self, model: PreTrainedModel, name: str) -> bool:
        """Whether this is the weight of a replaced layer."""
        parent, _, last = name.rpartition(".")
        return last == "weight" and isinstance(model.get_submodule(parent), Int8Linear)

    def replace(self, name: str, weight: Tensor) -> dict[str, nn.Parameter]:
        """Codes and scale of a weight."""
        codes, scale = self._layer.quantize(weight)
        return {
            name: nn.Parameter(codes, requires_grad=False),
            f"{name.removesuffix('weight')}scale": nn.Parameter(scale, requires_grad=False),
        }

    def finish(self, model: PreTrainedModel) -> None:
        """Packs the codes, and switches to the native attention and GELU."""
        for module in model.modules():
            if isinstance(module, Int8Linear):
                module.pack()
        if self._layer is NativeLinear:
            use_native_attention(model)
            fuse_gelu(model)


def leave_file(model: PreTrainedModel) -> None:
    """Copies the weights that stayed as they are, where they are views of the memory-mapped checkpoint.

    A single view keeps the whole file in memory, with all float32 weights that are not used any more.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()
    # Memory freed by quantizing lies between the new weights.
    give_back()
