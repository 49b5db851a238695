"""The encoder of a student: fresh, from a checkpoint, or copied from a model."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_MAPPING, AutoModel, PretrainedConfig, PreTrainedModel

from amtss_fast.models.checkpoints import load_model
from amtss_fast.models.places import read_model_config


def encoder_config(encoder: str | Path | PretrainedConfig | PreTrainedModel) -> PretrainedConfig:
    """The configuration of what a student is made from: a folder or Hub id, a configuration, or a model."""
    if isinstance(encoder, (str, Path)):
        return read_model_config(encoder, whose="encoder")
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
        FileNotFoundError: a path without a folder.
        UserError: a name that nothing has; a checkpoint that lacks weights of the encoder.
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
    encoder: PreTrainedModel = load_model(
        AutoModel, name_or_path, whose="encoder", config=text_config, **_without_pooler(text_config)
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
