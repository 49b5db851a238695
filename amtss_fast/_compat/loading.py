"""Weights that are replaced one at a time while transformers reads them: its interface of quantizers, which changes.

Importing this module needs `why_no_int8_loading() is None`.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

_METHOD = "amtss_fast"


class Replacement(Protocol):
    """What a caller of `replacing_weights` does at each step of `from_pretrained`."""

    def prepare(self, model: PreTrainedModel) -> None:
        """Puts other layers into the model, on the meta device, before any weight is read."""

    def replaces(self, model: PreTrainedModel, name: str) -> bool:
        """Whether the weight of this full name is one to replace."""

    def replace(self, name: str, weight: Tensor) -> dict[str, nn.Parameter]:
        """The parameters, by their full names, that take the place of a weight."""

    def finish(self, model: PreTrainedModel) -> None:
        """Ends the work on the model, after all weights are read."""


def replacing_weights(replacement: Replacement) -> QuantizationConfigMixin:
    """The argument `quantization_config` of `from_pretrained` that lets `replacement` replace weights."""
    return _Config(replacement)


@register_quantization_config(_METHOD)
class _Config(QuantizationConfigMixin):
    def __init__(self, replacement: Replacement, **kwargs: Any) -> None:
        self.quant_method: Any = _METHOD
        self.replacement = replacement

    def to_dict(self) -> dict[str, Any]:
        """What a model's configuration shows of it, which must be JSON."""
        return {"quant_method": _METHOD}


@register_quantizer(_METHOD)
class _Quantizer(HfQuantizer):
    requires_calibration = False
    is_trainable = False
    quantization_config: _Config

    @property
    def _replacement(self) -> Replacement:
        return self.quantization_config.replacement

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        self._replacement.prepare(model)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return self._replacement.replaces(model, param_name)

    def get_quantize_ops(self) -> ConversionOps:
        return _Replace(self._replacement)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        self._replacement.finish(model)

    def is_serializable(self) -> bool:
        return False


class _Replace(ConversionOps):
    def __init__(self, replacement: Replacement) -> None:
        self._replacement = replacement

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        parameters: dict[str, nn.Parameter] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            parameters |= self._replacement.replace(name, weight)
        return parameters
