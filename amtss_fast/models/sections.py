"""The encoder that a run's configuration names: a place, or a section that describes one with random weights."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoModel, PretrainedConfig, PreTrainedTokenizerBase

from amtss_fast.errors import UserError
from amtss_fast.models.places import read_model_config, told_of
from amtss_fast.models.tokenizers import check_vocabulary, vocabulary_size

_SET_BY_THE_RUN = ("id2label", "label2id", "num_labels", "problem_type")
_SIZES = ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size", "max_position_embeddings")


def read_encoder(
    encoder: str | Path | Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, *, whose: str = "encoder"
) -> PretrainedConfig:
    """The configuration of an encoder, checked without weights: it can be built, and it fits the tokenizer.

    Args:
        encoder: a folder or Hub id; or a section with `model_type`, whose vocabulary and pad token default to the
            tokenizer's.
        tokenizer: the one that makes its token ids.
        whose: what messages call it.

    Raises:
        FileNotFoundError: a path without a folder.
        UserError: no `model_type`, an unknown key or a wrong value; a model that does not read token ids; a table of
            embeddings that lacks ids of the tokenizer.
    """
    if isinstance(encoder, Mapping):
        with told_of(whose):
            config = section_config(encoder, tokenizer)
            with torch.device("meta"):
                AutoModel.from_config(config, trust_remote_code=False)
    else:
        config = read_model_config(encoder, whose=whose)
        whose = f"{whose} ({encoder})"
    with told_of(whose):
        check_reads_tokens(config)
    check_vocabulary(getattr(config.get_text_config(), "vocab_size", None), tokenizer, whose)
    return config


def section_config(section: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """The configuration that a section describes.

    Raises:
        UserError: no `model_type`, an unknown key or a wrong value.
    """
    values = dict(section)
    model_type = values.pop("model_type", None)
    if model_type is None:
        raise UserError("model_type is missing, such as 'bert'")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise UserError(f"model_type {model_type!r} is unknown{_nearest(str(model_type), list(CONFIG_MAPPING))}")
    config_class = CONFIG_MAPPING[model_type]
    _check_keys(config_class, values)
    pad_id = tokenizer.pad_token_id
    if values.get("pad_token_id", pad_id) != pad_id:
        raise UserError(f"pad_token_id is {values['pad_token_id']}, but its tokenizer pads with {pad_id}")
    config = config_class(**{"vocab_size": vocabulary_size(tokenizer), "pad_token_id": pad_id, **values})
    for name in _SIZES:
        size = getattr(config, name, None)
        if name in values and not (isinstance(size, int) and size > 0):
            raise UserError(f"{name} must be an integer of at least 1, got {values[name]!r}")
    layers = getattr(config, "num_hidden_layers", 0)
    if isinstance(layers, int) and layers < 0:
        raise UserError(f"num_hidden_layers must be at least 0, got {layers}")
    return config


def _check_keys(config_class: type[PretrainedConfig], values: Mapping[str, Any]) -> None:
    """Refuses keys that the class does not know: it keeps any other key, but nothing reads it."""
    default = config_class()
    for key, value in values.items():
        if key in _SET_BY_THE_RUN:
            raise UserError(f"{key} is set by the run, from its data; leave it out")
        known = hasattr(default, str(key)) and not callable(getattr(default, str(key)))
        if not known and _only_kept(config_class, default, str(key), value):
            known_names = [name for name in (*vars(default), *default.attribute_map) if not name.startswith("_")]
            raise UserError(
                f"{default.model_type!r} has no setting {key!r}, got {value!r}{_nearest(str(key), known_names)}"
            )


def _only_kept(config_class: type[PretrainedConfig], default: PretrainedConfig, key: str, value: Any) -> bool:
    """Whether a key changes nothing in a configuration but that it is there; others have become part of a setting."""
    changed, plain = vars(config_class(**{key: value})), vars(default)
    return all(repr(changed[name]) == repr(plain.get(name)) for name in changed if name != key)


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_reads_tokens(config: PretrainedConfig, *, alone: bool = False) -> None:
    """Refuses a model that does not read token ids, such as one of images.

    Args:
        config: the model's.
        alone: also refuses one that needs token ids for a decoder.

    Raises:
        UserError: naming the model type.
    """
    found = MODEL_MAPPING.get(type(config), None)
    for model_class in found if isinstance(found, (tuple, list)) else [found]:
        if model_class is None:
            continue
        inputs = inspect.signature(model_class.forward).parameters
        if "input_ids" not in inputs:
            raise UserError(
                f"a model of type {config.model_type!r} reads no texts, it reads {next(iter(list(inputs)[1:]))}"
            )
        if alone and "decoder_input_ids" in inputs:
            raise UserError(f"an encoder is needed, a model of type {config.model_type!r} is an encoder-decoder")
