"""Tokenizers: loading one, its pad token, its embedding table, and whether two give the same ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from amtss_fast._compat.transformers import has_file
from amtss_fast.errors import UserError
from amtss_fast.models.places import loading, reason

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


def load_tokenizer(name_or_path: str | Path, *, whose: str = "tokenizer") -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or Hub id, with a pad token, which pads on the right.

    `AutoTokenizer` alone makes an empty tokenizer, which maps every word to "unknown", for a checkpoint without
    tokenizer files. This function refuses such a checkpoint.

    A tokenizer without a pad token pads with its end of text (else its beginning) where it does not end texts with it:
    padding is masked, and classifiers that read the last token before the padding then find it.

    Padding is on the right, whatever the checkpoint says: with padding on the left the first token is no text, and
    models that count positions from the first column would shift them.

    Args:
        name_or_path: a folder or Hub id.
        whose: what messages call its owner.

    Raises:
        FileNotFoundError: a path without a folder.
        UserError: no tokenizer there, a broken one, or one that cannot pad.
    """
    hint = "no tokenizer found: save one there with tokenizer.save_pretrained, or name another"
    with loading(whose, name_or_path) as place:
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            unknown = isinstance(error, OSError) and not Path(place).is_dir()
            if unknown or has_file(place, "tokenizer.json") or has_file(place, "tokenizer_config.json"):
                raise
            raise UserError(f"{hint} ({reason(error)})") from error
        files = {"tokenizer_config.json", "tokenizer.json", *tokenizer.vocab_files_names.values()}
        if not any(has_file(place, file) for file in sorted(files)):
            raise UserError(hint)
        tokenizer.padding_side = "right"
        _need_pad_token(tokenizer)
    return tokenizer


def _need_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token_id is not None:
        return
    ending = tokenizer("a")["input_ids"][-1]
    for token, index in (
        (tokenizer.eos_token, tokenizer.eos_token_id),
        (tokenizer.bos_token, tokenizer.bos_token_id),
    ):
        if index is not None and index != ending:
            tokenizer.pad_token = token
            return
    raise UserError(
        "its tokenizer has no pad token, and no beginning or end of text that could stand for it; give it one with "
        "tokenizer.pad_token = ... and tokenizer.save_pretrained"
    )


def adopt_pad_token(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes a model's configuration name the token that its tokenizer pads with.

    Classifiers of language models read the last token that is not this one. It may be missing in the configuration, or
    be another one; then they would read the padding.
    """
    config.get_text_config().pad_token_id = tokenizer.pad_token_id


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Rows that an embedding table needs for this tokenizer: its largest id, plus 1."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=0))


def check_vocabulary(rows: int | None, tokenizer: PreTrainedTokenizerBase, whose: str) -> None:
    """Refuses an embedding table of fewer rows than the tokenizer has ids; None is a model without such a table.

    Raises:
        UserError: both numbers.
    """
    needed = vocabulary_size(tokenizer)
    if rows is not None and rows < needed:
        raise UserError(
            f"{whose}: its embedding table has {rows} rows (vocab_size), but its tokenizer has ids up to {needed - 1}, "
            f"so it needs {needed}"
        )


def embedding_rows(model: PreTrainedModel) -> int | None:
    """Rows of a model's word embeddings; None where it has no such table."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    return None if weight is None else int(weight.shape[0])


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
