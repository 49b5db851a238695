"""The encoder of a student: fresh, from a checkpoint, or copied from a model."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from amtss_fast.errors import UserError


def encoder_config(encoder: str | Path | PretrainedConfig | PreTrainedModel) -> PretrainedConfig:
    """The configuration of what a student is made from: a folder or Hub id, a configuration, or a model."""
    if isinstance(encoder, (str, Path)):
        config: PretrainedConfig = AutoConfig.from_pretrained(encoder, trust_remote_code=False)
        return config
    if isinstance(encoder, PreTrainedModel):
        return encoder.config
    if isinstance(encoder, PretrainedConfig):
        return encoder
    raise TypeError(
        f"encoder must be a folder, a Hub id, a PretrainedConfig or a PreTrainedModel, got {type(encoder).__name__}"
    )


def make_encoder(
    source: str | Path | PretrainedConfig | PreTrainedModel, text_config: PretrainedConfig
) -> PreTrainedModel:
    """The encoder with this configuration: fresh weights, those of a checkpoint, or a copy of a model's encoder.

    Raises:
        UserError: the checkpoint lacks weights of the encoder.
        OSError: nothing found under that name.
    """
    if isinstance(source, (str, Path)):
        return _loaded(source, text_config)
    if isinstance(source, PreTrainedModel):
        return _copy(source)
    return _fresh(text_config)


def _fresh(text_config: PretrainedConfig) -> PreTrainedModel:
    encoder: PreTrainedModel = AutoModel.from_config(
        text_config,
        # The dtype of the other parts, whatever the encoder's configuration says.
        dtype=torch.get_default_dtype(),
        trust_remote_code=False,
        **_without_pooler(text_config),
    )
    return encoder


def _loaded(name_or_path: str | Path, text_config: PretrainedConfig) -> PreTrainedModel:
    encoder: PreTrainedModel
    encoder, info = AutoModel.from_pretrained(
        name_or_path,
        config=text_config,
        output_loading_info=True,
        use_safetensors=True,
        trust_remote_code=False,
        **_without_pooler(text_config),
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        raise UserError(
            f"encoder {str(name_or_path)!r} lacks weights of {type(encoder).__name__}: missing "
            f"{sorted(info['missing_keys'])}, of another shape {sorted(info['mismatched_keys'])}"
        )
    return encoder


def _copy(model: PreTrainedModel) -> PreTrainedModel:
    encoder: Any = copy.deepcopy(model.base_model)
    if _without_pooler(encoder.config) and getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    copied: PreTrainedModel = encoder
    return copied


def _without_pooler(text_config: PretrainedConfig) -> dict[str, bool]:
    """Keyword arguments that leave out the pooler; empty where the encoder has no such argument.

    The student does not use the pooler, and DDP refuses parameters without a gradient.
    """
    model_class = MODEL_MAPPING.get(type(text_config), None)
    classes = model_class if isinstance(model_class, (tuple, list)) else [model_class]
    if any(c is None or "add_pooling_layer" not in inspect.signature(c).parameters for c in classes):
        return {}
    return {"add_pooling_layer": False}
