"""Tokenizers: loading one, the longest input it allows, and whether two give the same ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from amtss_fast._compat.transformers import has_file

# Settings that do not change the ids: where a tokenizer came from, how it truncates and pads, and what its list of
# special tokens repeats.
_NOT_ABOUT_IDS = {
    "additional_special_tokens",
    "extra_special_tokens",
    "is_local",
    "local_files_only",
    "model_max_length",
    "name_or_path",
    "padding_side",
    "truncation_side",
}


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id.

    `AutoTokenizer` alone makes an empty tokenizer, which maps every word to "unknown", for a checkpoint without
    tokenizer files. This function refuses such a checkpoint.

    Raises:
        RuntimeError: no tokenizer there.
    """
    name = str(name_or_path)
    hint = f"no tokenizer found in {name!r}: save one there with tokenizer.save_pretrained, or pass tokenizer="
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise RuntimeError(f"{hint} ({error})") from error
    files = {"tokenizer_config.json", "tokenizer.json", *tokenizer.vocab_files_names.values()}
    if not any(has_file(name, file) for file in sorted(files)):
        raise RuntimeError(hint)
    return tokenizer


def max_input_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The most tokens that model and tokenizer take, or None if neither has a limit.

    The smallest of the tokenizer's `model_max_length`, the configuration's `max_position_embeddings` and the rows of
    the position table. In a table with a padding row (XLM-R and related models) positions start after that row: 514
    rows hold 512 tokens.
    """
    limits = [tokenizer.model_max_length]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        limits.append(positions)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "position_embeddings" and isinstance(module, nn.Embedding):
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - unused)
    limit = min(limits)
    # transformers writes "no limit" as 1e30.
    return None if limit > 10**9 else int(limit)


def tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Everything that decides about a tokenizer's ids; equal for two tokenizers that give the same ids.

    Truncation and padding do not count, neither as settings nor as what the last call left behind. Special tokens do,
    because a model may compare ids with the padding id, and so do the names of the inputs that the tokenizer makes.
    The rest of a fast tokenizer is its serialized pipeline (normalizer, vocabulary, merges, added tokens, template);
    the rest of a slow one is its class, vocabulary and settings.
    """
    state: dict[str, Any] = {
        "roles": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "special": sorted(tokenizer.all_special_tokens),
        "inputs": sorted(tokenizer.model_input_names),
    }
    if tokenizer.is_fast:
        pipeline = json.loads(tokenizer.backend_tokenizer.to_str())
        state["pipeline"] = {**pipeline, "truncation": None, "padding": None}
    else:
        state["class"] = type(tokenizer).__qualname__
        state["vocabulary"] = tokenizer.get_vocab()
        state["settings"] = {
            name: repr(value)
            for name, value in tokenizer.init_kwargs.items()
            if value is not None and name not in _NOT_ABOUT_IDS and not name.endswith("_file")
        }
    return state
