"""Token ids for the student."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, Features, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from amtss_fast._compat.datasets import fingerprint
from amtss_fast.data.languages import language_counts
from amtss_fast.errors import UserError
from amtss_fast.loss.options import IGNORE_INDEX
from amtss_fast.models.tokenizers import tokenizer_state


def encode(
    dataset: Dataset | DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    *,
    languages: Sequence[str],
    max_length: int,
    keep_text: bool = False,
) -> Dataset | DatasetDict:
    """Token ids for the student.

    The result has the columns

    - `input_ids` and `attention_mask`: lists of at most `max_length` integers, not padded, and `token_type_ids` if the
      tokenizer gives them;
    - `language_ids`: the place of the row's language in `languages`;
    - `labels`: ClassLabel, -1 = unlabeled. In a set of words a list with an entry for each token: a word's label at its
      first token, -100 at its other tokens and at special tokens;
    - `text` and `text_pair` with `keep_text`, for teachers that have a tokenizer of their own.

    Its fingerprint depends on the data, the tokenizer and the arguments alone.

    Args:
        dataset: as `load_data` gives it.
        tokenizer: the student's.
        languages: the student's languages.
        max_length: the most tokens of a row, special tokens included.
        keep_text: keeps the text columns.

    Raises:
        UserError: a language that is not in `languages` (the message gives the counts found); a `max_length` that the
            tokenizer does not allow; a set of words with a slow tokenizer or with `keep_text`.
    """
    if isinstance(dataset, DatasetDict):
        options: dict[str, Any] = {"languages": languages, "max_length": max_length, "keep_text": keep_text}
        return DatasetDict({split: encode(part, tokenizer, **options) for split, part in dataset.items()})
    _check_languages(dataset, languages)
    pair = "text_pair" in dataset.column_names
    words = isinstance(dataset.features["text"], datasets.List)
    if words and (keep_text or not tokenizer.is_fast):
        raise UserError("labels of words need a fast tokenizer, the same one for student and teachers (no keep_text)")
    _check_length(tokenizer, pair, max_length)
    language_ids = {code: index for index, code in enumerate(languages)}

    def batch_ids(batch: dict[str, list[Any]]) -> dict[str, Any]:
        pairs = list(batch["text_pair"]) if pair else None
        ids = tokenizer(list(batch["text"]), pairs, truncation=True, max_length=max_length, is_split_into_words=words)
        labels = list(batch["label"])
        if words:
            labels = [_token_labels(ids.word_ids(row), values) for row, values in enumerate(labels)]
        return {**ids, "language_ids": [language_ids[code] for code in batch["language"]], "labels": labels}

    features = _features(dataset, tokenizer, keep_text)
    # Truncation changes the rows, but `tokenizer_state` leaves its side out.
    state = (tokenizer_state(tokenizer), tokenizer.truncation_side)
    return dataset.map(
        batch_ids,
        batched=True,
        remove_columns=[name for name in dataset.column_names if name not in features],
        features=features,
        new_fingerprint=Hasher.hash((fingerprint(dataset), state, list(languages), max_length, keep_text)),
        desc=f"Tokenizing {dataset.split or 'texts'}",
    )


def _check_languages(dataset: Dataset, languages: Sequence[str]) -> None:
    found = language_counts(dataset)
    unknown = sorted(set(found) - set(languages))
    if unknown:
        raise UserError(
            f"the data has languages that the student does not have: {unknown}; "
            f"rows per language: {found}; languages={list(languages)}"
        )


def _check_length(tokenizer: PreTrainedTokenizerBase, pair: bool, max_length: int) -> None:
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    if not special < max_length <= tokenizer.model_max_length:
        raise UserError(
            f"max_length must be above {special} (the special tokens) and at most "
            f"{tokenizer.model_max_length} (the tokenizer's limit), not {max_length}"
        )


def _features(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, keep_text: bool) -> Features:
    features = Features({"input_ids": datasets.List(Value("int32"))})
    for name in tokenizer.model_input_names:
        if name in ("attention_mask", "token_type_ids"):
            features[name] = datasets.List(Value("int8"))
    features["language_ids"] = Value("int64")
    label = dataset.features["label"]
    # A label of a token may be -100, which ClassLabel refuses.
    features["labels"] = datasets.List(Value("int64")) if isinstance(label, datasets.List) else label
    if keep_text:
        features.update({name: dataset.features[name] for name in ("text", "text_pair") if name in dataset.features})
    return features


def _token_labels(word_ids: Sequence[int | None], labels: Sequence[int]) -> list[int]:
    """A label for each token: its word's at the first token of the word, IGNORE_INDEX elsewhere."""
    return [
        labels[word] if word is not None and word != before else IGNORE_INDEX
        for word, before in zip(word_ids, [None, *word_ids], strict=False)
    ]
