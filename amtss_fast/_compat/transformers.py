"""Private and unstable interfaces of transformers: each stands here once, with the error that names what is gone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.utils import HFValidationError, validate_repo_id  # type: ignore[attr-defined]
from packaging.version import Version
from torch import Tensor, nn
from transformers import PretrainedConfig, Trainer
from transformers.trainer_callback import ExportableState
from transformers.utils.hub import cached_file

__all__ = [
    "INT8_VERSION",
    "TRAINER_ATTRIBUTES",
    "TRAINER_METHODS",
    "ExportableState",
    "attention_implementation",
    "has_file",
    "may_be_hub_id",
    "prepare_inputs",
    "set_attention_implementation",
    "why_no_int8_loading",
    "zero_unless_loaded",
]

TRAINER_METHODS: Mapping[str, tuple[str, ...]] = {
    "_get_train_sampler": ("train_dataset",),
    "_get_num_items_in_batch": ("batch_samples", "device"),
    "_prepare_inputs": ("inputs",),
    "_get_grad_norm": ("model", "grad_norm"),
    "_save_rng_state": ("output_dir",),
}
"""Private methods of `transformers.Trainer` that this package calls or overrides, with their parameters after self."""

TRAINER_ATTRIBUTES: Mapping[str, str] = {
    "model_accepts_loss_kwargs": "4.46",
    "loss_is_scaled_for_ga": "5.20",
}
"""Attributes of `transformers.Trainer` that this package sets, with the version since which they are read."""

INT8_VERSION = "5.23"
"""The first transformers whose `from_pretrained` hands every weight to the quantizer under its own name."""


def _gone(name: str) -> RuntimeError:
    return RuntimeError(f"transformers {transformers.__version__} has no {name}, which amtss_fast needs")


def attention_implementation(config: PretrainedConfig) -> str | None:
    """The name of the attention that a model of this configuration runs; None before one is chosen.

    Raises:
        RuntimeError: this version keeps it elsewhere.
    """
    try:
        name: str | None = config._attn_implementation
    except AttributeError:
        raise _gone("PretrainedConfig._attn_implementation") from None
    return name


def set_attention_implementation(config: PretrainedConfig, name: str | None) -> None:
    """Chooses the attention of models that are made from this configuration later.

    Raises:
        RuntimeError: this version keeps it elsewhere.
    """
    attention_implementation(config)
    config._attn_implementation = name


def zero_unless_loaded(*parameters: Tensor) -> None:
    """Sets parameters to 0 in place, but those that `from_pretrained` has read from a file and marked."""
    for parameter in parameters:
        if not getattr(parameter, "_is_hf_initialized", False):
            nn.init.zeros_(parameter)


def has_file(name_or_path: str | Path, file: str) -> bool:
    """Whether a folder or a Hub id has this file; one of a Hub id is downloaded."""
    try:
        return cached_file(str(name_or_path), file) is not None
    except OSError:
        # The public way to learn that it is missing.
        return False


def may_be_hub_id(text: str) -> bool:
    """Whether a text has the form of a Hub id, `name` or `namespace/name`."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def prepare_inputs(trainer: Trainer, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch as the trainer gives it to the model: on its device."""
    inputs: dict[str, Any] = trainer._prepare_inputs(dict(batch))
    return inputs


def why_no_int8_loading() -> str | None:
    """Why this transformers cannot load teachers in 8 bits; None if it can."""
    installed = transformers.__version__
    if Version(Version(installed).base_version) >= Version(INT8_VERSION):
        return None
    return f"8-bit loading needs transformers>={INT8_VERSION}, installed is {installed}"
