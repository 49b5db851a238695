"""Multilingual data in one shape: text, optional text_pair, label, language; or words, each with a label.

`load_data` reads the embedded sets, the Hub and local CSV, JSON lines and Parquet; `encode` and
`DistillationCollator` turn the result into batches for the student.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets.fingerprint import Hasher
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from amtss_fast.data.sources import EMBEDDED, Part, Source, is_embedded, read_parts
from amtss_fast.loss.options import IGNORE_INDEX, UNLABELED_INDEX

_SPLIT_ORDER = ("train", "validation", "test")
# Offsets of an Arrow string array are 32 bits: a chunk of this many rows stays far below 2 GiB.
_CHUNK_ROWS = 100_000


@dataclass(frozen=True)
class _Columns:
    """The columns that the caller asked for, by name."""

    text: str | None
    text_pair: str | None
    label: str | None
    language: str | None
    language_default: str | None
    extra: tuple[str, ...]

    def of(self, table: pa.Table, origin: str) -> tuple[str, str | None]:
        """The text columns of this table: those asked for, or `text`, or XNLI's two."""
        if self.text is not None:
            text, pair = self.text, self.text_pair
        elif "text" not in table.column_names and {"premise", "hypothesis"} <= set(table.column_names):
            text, pair = "premise", self.text_pair or "hypothesis"
        else:
            text, pair = "text", self.text_pair
        for argument, name in (
            ("text", text),
            ("text_pair", pair),
            ("label", self.label),
            *(("keep", name) for name in self.extra),
        ):
            if name is not None and name not in table.column_names:
                raise ValueError(
                    f"{origin} has no column {name!r} (argument {argument}); its columns are {table.column_names}"
                )
        return text, pair


def load_data(
    name_or_path: Source,
    *,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = "label",
    language: str | None = "language",
    label_names: Sequence[str] | None = None,
    languages: Sequence[str] | None = None,
    splits: Sequence[str] | Mapping[str, str] | None = None,
    split_column: str | None = "split",
    language_default: str | None = None,
    keep: Sequence[str] = (),
    config: str | None = None,
    **hub: Any,
) -> DatasetDict:
    """Reads a labelled multilingual data set into the standard shape.

    Each split of the result has the columns `text` (str), `text_pair` (str, only if there are two
    text columns), `label` (ClassLabel, -1 = unlabelled), `language` (str) and the columns of
    `keep`. It lives in memory, and its fingerprint depends on its content alone.

    `name_or_path` is one of:

    - `"cldr_topic"` or `"cldr_pairs"`, the embedded sets (see `embedded/README.md`);
    - `"xnli"`: `facebook/xnli` from the Hub. `config` is `"all_languages"` or one language;
      without it the configurations of `languages` are read, or `all_languages`;
    - a local file, folder, glob pattern, a list of these, or a mapping from split to these.
      Formats: .csv and .tsv with a header, JSON lines (.jsonl, .ndjson, .json), .parquet;
    - any other Hub id; `config` and `**hub` (`revision`, `token`, ...) go to
      `datasets.load_dataset`.

    In local tables the split comes from the mapping, else from the file's or a folder's name
    (train, validation, valid, val, dev, test), else from `split_column` where the table has it;
    else all rows are `train`.

    The language comes from the column `language`, else from `language_default`, else from a local
    file's or folder's name (`en/train.parquet`, `train.pt-BR.csv`). Translation columns, as in
    XNLI's `all_languages` (`{"en": text, ...}` or `{"language": [...], "translation": [...]}`),
    become one row for each language in which all text columns are given.

    A text column that holds lists of words makes a set for token classification: `text` holds lists of str and `label`
    as long lists of ClassLabel, read from a label column of such lists (empty: no word of the row is labelled).

    Labels may be class ids or names. Names get ids in sorted order, or in the order of
    `label_names`; without `label_names` the ids must be 0, 1, ... without a gap, and a set that
    carries its own names keeps them. An empty label or -1 is unlabelled, and `label=None` reads a
    set that has no labels.

    Args:
        text, text_pair: names of the text columns. Without them `text`, or `premise` and
            `hypothesis` in a table that has these and no `text`.
        languages: keeps these languages only, in all splits.
        splits: keeps these splits only; a mapping {new name: name in the source} renames too.
        keep: further columns to keep as they are.

    Raises:
        FileNotFoundError: a path or a Hub set that is not there, an unknown name.
        ValueError: a missing column, an unknown language, a label outside the label names, an
            empty split, an unreadable file; the message shows what was found.
    """
    if isinstance(label_names, str) or isinstance(languages, str) or isinstance(keep, str):
        raise TypeError("label_names, languages and keep are sequences of names, not one string")
    if label is None and label_names is None:
        raise ValueError("label=None (a set without labels) needs label_names")
    if label_names is not None and len(set(label_names)) != len(label_names):
        raise ValueError(f"label_names has a name twice: {list(label_names)}")
    if text is None and text_pair is not None:
        raise ValueError(f"text_pair={text_pair!r} needs text, the name of the first text column")
    if is_embedded(name_or_path):
        split_column = "split"
        if text is None:
            text, text_pair = EMBEDDED[str(name_or_path)]
    chosen = _Columns(text, text_pair, label, language, language_default, tuple(keep))
    parts = read_parts(name_or_path, split_column=split_column, languages=languages, config=config, hub=hub)
    parts = _choose_splits(parts, splits, name_or_path)
    own_names = _own_label_names(parts, label)
    tables = {split: _standard_table(parts[split], chosen) for split in parts}
    if languages is not None:
        tables = _choose_languages(tables, languages)
    for split, table in tables.items():
        if table.num_rows == 0:
            found = {name: _count(table["language"]) for name, table in tables.items()}
            raise ValueError(f"split {split!r} is empty; rows per split and language: {found}")
    return _with_labels(tables, own_names, label_names, chosen.extra)


def keep_labels(dataset: Dataset, fraction: float, *, seed: int, per: Sequence[str] = ("language",)) -> Dataset:
    """The same rows with all but a fraction of the labels hidden as -1.

    The kept labels are drawn at random in equal shares from each class in each group of rows that
    agree in the columns `per`. Together they are `round(fraction * labelled rows)`, or a little
    more: with a fraction above 0 every class keeps at least one label in each group that has it.
    The same data, seed and fraction give the same choice. Rows without a label stay so. Of words, whole rows keep or
    lose their labels, in equal shares from each group.

    Raises ValueError for a fraction outside [0, 1] and for a column that is not there.
    """
    if isinstance(dataset, DatasetDict):
        raise TypeError("keep_labels takes one split, for example data['train']")
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be in [0, 1], not {fraction}")
    for name in ("label", *per):
        if name not in dataset.column_names:
            raise ValueError(f"no column {name!r} in the data set; its columns are {dataset.column_names}")
    table = _table(dataset)
    words = isinstance(dataset.features["label"], datasets.List)
    labels = _most_of_each_row(table["label"]) if words else table["label"].to_numpy()
    group = np.zeros(len(labels), dtype=np.int64)
    for column in (*(table[name] for name in per), *([] if words else [table["label"]])):
        codes = _codes(column)
        _, group = np.unique(group * (codes.max(initial=0) + 1) + codes, return_inverse=True)

    labelled = np.flatnonzero(labels != UNLABELED_INDEX)
    # A random order, then grouped: the first rows of each group are the ones that keep the label.
    order = labelled[np.random.default_rng(seed).permutation(len(labelled))]
    order = order[np.argsort(group[order], kind="stable")]
    _, starts, sizes = np.unique(group[order], return_index=True, return_counts=True)
    keeps = np.zeros(len(labels), dtype=bool)
    for start, quota in zip(starts, _quotas(sizes, fraction), strict=True):
        keeps[order[start : start + quota]] = True
    if words:
        column = table["label"].combine_chunks()
        keeps = np.repeat(keeps, pc.list_value_length(column).to_numpy())
        values = np.where(keeps, pc.list_flatten(column).to_numpy(), UNLABELED_INDEX)
        kept = _lists(pa.array(values), column)
    else:
        kept = pa.array(np.where(keeps, labels, UNLABELED_INDEX))
    table = table.set_column(table.column_names.index("label"), "label", kept)
    return _dataset(table, dataset.features, dataset.split)


def split_data(
    dataset: Dataset,
    *,
    validation: float = 0.1,
    test: float = 0.1,
    seed: int,
    by: str | None = None,
) -> DatasetDict:
    """Splits one table at random into train, validation and test.

    `validation` and `test` are fractions of the rows; 0 leaves the split out. With `by`, rows that
    agree in this column stay together (the same sentence in several languages, for example), and
    the fractions are of its distinct values.

    Raises ValueError for fractions that leave nothing to train on or make a split empty.
    """
    if isinstance(dataset, DatasetDict):
        raise TypeError("split_data takes one table, for example data['train']")
    if validation < 0 or test < 0 or validation + test >= 1:
        raise ValueError(f"validation and test must be at least 0 and below 1 together, not {validation} and {test}")
    if by is None:
        unit = np.arange(len(dataset))
    elif by in dataset.column_names:
        unit = _codes(_table(dataset)[by])
    else:
        raise ValueError(f"no column {by!r} (argument by) in the data set; its columns are {dataset.column_names}")
    units = int(unit.max(initial=-1)) + 1
    sizes = {"validation": round(units * validation), "test": round(units * test)}
    sizes["train"] = units - sum(sizes.values())
    place = np.random.default_rng(seed).permutation(units)[unit]
    result, start = DatasetDict(), 0
    wanted = {"train": 1 - validation - test, "validation": validation, "test": test}
    for split in _SPLIT_ORDER:
        rows = np.flatnonzero((place >= start) & (place < start + sizes[split]))
        start += sizes[split]
        if wanted[split] == 0:
            continue
        if len(rows) == 0:
            raise ValueError(
                f"split {split!r} is empty: {units} {'rows' if by is None else f'values of {by!r}'}"
                f" are too few for validation={validation}, test={test}"
            )
        result[split] = _dataset(_table(dataset).take(rows), dataset.features, split)
    return result


def language_counts(dataset: Dataset) -> dict[str, int]:
    """The number of rows of each language, in the order of their first rows."""
    return _count(_table(dataset.select_columns("language"))["language"])


def encode(
    dataset: Dataset | DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    *,
    languages: Sequence[str],
    max_length: int,
    keep_text: bool = False,
) -> Dataset | DatasetDict:
    """Token ids for the student.

    The result has `input_ids` and `attention_mask` (lists, not padded, at most `max_length`
    tokens), `token_type_ids` if the tokenizer gives them, `language_ids` (the position of the
    row's language in `languages`) and `labels` (ClassLabel, -1 = unlabelled); with `keep_text` the
    texts too, for teachers that have a tokenizer of their own. Of words, `labels` has an entry for each token: a word's
    label at its first token, -100 at the others and at special tokens. Its fingerprint depends on the data, the
    tokenizer and the arguments alone.

    Raises ValueError for a language that is not in `languages` (with the counts found) and for a
    `max_length` that the tokenizer does not allow.
    """
    if isinstance(dataset, DatasetDict):
        return DatasetDict(
            {
                split: encode(
                    part,
                    tokenizer,
                    languages=languages,
                    max_length=max_length,
                    keep_text=keep_text,
                )
                for split, part in dataset.items()
            }
        )
    found = language_counts(dataset)
    unknown = sorted(set(found) - set(languages))
    if unknown:
        raise ValueError(
            f"the data has languages that the student does not have: {unknown}; "
            f"rows per language: {found}; languages={list(languages)}"
        )
    pair = "text_pair" in dataset.column_names
    words = isinstance(dataset.features["text"], datasets.List)
    if words and (keep_text or not tokenizer.is_fast):
        raise ValueError("labels of words need a fast tokenizer, the same one for student and teachers (no keep_text)")
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    if not special < max_length <= tokenizer.model_max_length:
        raise ValueError(
            f"max_length must be above {special} (the special tokens) and at most "
            f"{tokenizer.model_max_length} (the tokenizer's limit), not {max_length}"
        )
    language_ids = {code: index for index, code in enumerate(languages)}

    def batch_ids(batch: dict[str, list[Any]]) -> dict[str, Any]:
        pairs = list(batch["text_pair"]) if pair else None
        ids = tokenizer(list(batch["text"]), pairs, truncation=True, max_length=max_length, is_split_into_words=words)
        labels = list(batch["label"])
        if words:
            labels = [_token_labels(ids.word_ids(row), values) for row, values in enumerate(labels)]
        return {**ids, "language_ids": [language_ids[code] for code in batch["language"]], "labels": labels}

    texts = ["text", "text_pair"] if pair else ["text"]
    features = Features({"input_ids": datasets.List(Value("int32"))})
    for name in tokenizer.model_input_names:
        if name in ("attention_mask", "token_type_ids"):
            features[name] = datasets.List(Value("int8"))
    features["language_ids"] = Value("int64")
    features["labels"] = datasets.List(Value("int64")) if words else dataset.features["label"]
    if keep_text:
        features.update({name: dataset.features[name] for name in texts})
    return dataset.map(
        batch_ids,
        batched=True,
        remove_columns=[name for name in dataset.column_names if name not in features],
        features=features,
        new_fingerprint=Hasher.hash(
            (
                dataset._fingerprint,
                _tokenizer_state(tokenizer),
                list(languages),
                max_length,
                keep_text,
            )
        ),
        desc=f"Tokenising {dataset.split or 'texts'}",
    )


def _token_labels(word_ids: Sequence[int | None], labels: Sequence[int]) -> list[int]:
    """A label for each token: its word's at the first of the word, IGNORE_INDEX elsewhere."""
    first = [word is not None and word != before for word, before in zip(word_ids, [None, *word_ids], strict=False)]
    return [labels[cast(int, word)] if begins else IGNORE_INDEX for word, begins in zip(word_ids, first, strict=True)]


class DistillationCollator:
    """Pads encoded rows into a batch.

    The batch holds int64 tensors: `input_ids`, `attention_mask` (and `token_type_ids`) [N, T], `language_ids` [N] and
    `labels` [N], or [N, T] with -100 at the padding if they are of tokens; with `keep_text` also `text` (and
    `text_pair`), lists of N strings. T is the longest row, or the next multiple of `pad_to_multiple_of`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        keep_text: bool = False,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        self.keep_text = keep_text
        self._pad = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=pad_to_multiple_of)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if self.keep_text and "text" not in rows[0]:
            raise ValueError(
                f"keep_text=True needs the column 'text' in the rows, which have {list(rows[0])}; "
                "encode the data with keep_text=True"
            )
        texts = ("text", "text_pair")
        of_tokens = np.ndim(rows[0].get("labels", 0)) > 0
        left_out = (*texts, "labels") if of_tokens else texts
        ids = [{name: row[name] for name in row if name not in left_out} for row in rows]
        batch: dict[str, Any] = {name: value.to(torch.int64) for name, value in self._pad(ids).items()}
        if of_tokens:
            labels = torch.full(batch["input_ids"].shape, IGNORE_INDEX)
            labels[batch["attention_mask"].bool()] = torch.cat([torch.as_tensor(row["labels"]) for row in rows])
            batch["labels"] = labels
        if self.keep_text:
            batch.update({name: [row[name] for row in rows] for name in texts if name in rows[0]})
        return batch


def _choose_splits(
    parts: dict[str, list[Part]],
    splits: Sequence[str] | Mapping[str, str] | None,
    source: Source,
) -> dict[str, list[Part]]:
    if splits is None:
        order = [split for split in _SPLIT_ORDER if split in parts]
        return {split: parts[split] for split in (*order, *(s for s in parts if s not in order))}
    if isinstance(splits, str):
        raise TypeError(f"splits is a sequence or a mapping, not one string: {splits!r}")
    wanted = dict(splits) if isinstance(splits, Mapping) else {name: name for name in splits}
    unknown = sorted(set(wanted.values()) - set(parts))
    if unknown:
        raise ValueError(f"{source!r} has no split {unknown}; it has {list(parts)}")
    return {new: parts[old] for new, old in wanted.items()}


def _own_label_names(parts: Mapping[str, list[Part]], label: str | None) -> list[str] | None:
    """The label names that the tables carry in their metadata, if any."""
    found: dict[tuple[str, ...], str] = {}
    for part in (part for listed in parts.values() for part in listed):
        metadata = part.table.schema.metadata or {}
        names = _class_names(part.table.schema, label)
        if names is None and b"labels" in metadata:
            names = json.loads(metadata[b"labels"])
        if names is not None:
            found.setdefault(tuple(names), part.origin)
    if len(found) > 1:
        shown = "; ".join(f"{origin}: {list(names)}" for names, origin in found.items())
        raise ValueError(f"the tables carry different label names: {shown}")
    return list(next(iter(found))) if found else None


def _class_names(schema: pa.Schema, column: str | None) -> list[str] | None:
    """The names of a ClassLabel column of a table that `datasets` wrote."""
    if b"huggingface" not in (schema.metadata or {}):
        return None
    feature = Features.from_arrow_schema(schema).get(column)
    feature = getattr(feature, "feature", feature)
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def _standard_table(parts: Sequence[Part], chosen: _Columns) -> pa.Table:
    """The parts of one split as one table with `label` still as found."""
    tables: list[pa.Table] = []
    kinds: dict[str, str] = {}
    for part in parts:
        table, kind = _standard_part(part, chosen)
        tables.append(table)
        kinds.setdefault(kind, part.origin)
    if len(kinds) > 1:
        shown = "; ".join(f"{kind}: {origin}" for kind, origin in kinds.items())
        raise ValueError(f"the tables of one split differ in kind ({shown}); read them one by one")
    try:
        return pa.concat_tables(tables, promote_options="permissive").combine_chunks()
    except pa.ArrowException as error:
        raise ValueError(
            f"the tables of one split do not fit together: {error}; they are {[part.origin for part in parts]}"
        ) from error


def _standard_part(part: Part, chosen: _Columns) -> tuple[pa.Table, str]:
    table, origin = part.table, part.origin
    text, pair = chosen.of(table, origin)
    sources = {"text": text} if pair is None else {"text": text, "text_pair": pair}
    translated = [pa.types.is_struct(table[name].type) for name in sources.values()]
    if any(translated) and not all(translated):
        raise ValueError(
            f"{origin}: of the columns {list(sources.values())} only one holds translations; both or none must"
        )
    if all(translated):
        rows, columns = _explode(table, sources, origin)
        kind = "one row per text in all languages"
    else:
        rows = pa.array(np.arange(table.num_rows))
        columns = {name: table[source] for name, source in sources.items()}
        columns["language"] = _language_column(part, chosen)
        kind = "one row per text"
    words = pair is None and _is_list(columns["text"].type)
    if words:
        kind = "one row per list of words"
        columns["text"] = _checked_words(columns["text"], text, origin)
    for name in (*(() if words else sources), "language"):
        column = columns[name]
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            raise ValueError(f"{origin}: column {sources.get(name, chosen.language)!r} holds {column.type}, not text")
        if column.null_count:
            first = pc.index(column.is_null(), True).as_py()
            raise ValueError(
                f"{origin}: column {sources.get(name, chosen.language)!r} has {column.null_count} "
                f"empty values, the first in row {first}"
            )
        columns[name] = column.cast(pa.large_string())
    if chosen.label is not None:
        columns["label"] = table[chosen.label].take(rows)
        if _is_list(columns["label"].type) != words:
            shown = f"{chosen.label!r} holds {columns['label'].type}, column {text!r} {table[text].type}"
            raise ValueError(f"{origin}: column {shown}: either both hold lists, of words and of their labels, or none")
        if words:
            columns["label"] = _checked_word_labels(columns["label"], columns["text"], chosen.label, origin)
    else:
        columns["label"] = pa.nulls(len(rows), pa.int64())
    for name in chosen.extra:
        if name in columns:
            raise ValueError(f"keep={name!r} would replace the standard column of this name")
        columns[name] = table[name].take(rows)
    return pa.table(columns), f"{kind}, columns {sorted(sources)}"


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _lists(values: pa.Array, like: pa.Array) -> pa.Array:
    """The values in lists of the same lengths."""
    ends = np.cumsum(pc.list_value_length(like).to_numpy())
    return pa.LargeListArray.from_arrays(pa.array(np.concatenate([[0], ends])), values)


def _checked_words(column: pa.ChunkedArray, name: str, origin: str) -> pa.Array:
    """Lists of words as one array, none of them empty."""
    kind = column.type.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ValueError(f"{origin}: column {name!r} holds lists of {kind}, not of words")
    words = column.combine_chunks().cast(pa.large_list(pa.large_string()))
    lengths = pc.list_value_length(words).fill_null(0).to_numpy()
    wrong = lengths == 0
    wrong[pc.list_parent_indices(words).filter(pc.list_flatten(words).is_null())] = True
    if wrong.any():
        raise ValueError(f"{origin}: column {name!r} has no word, or an empty one, in row {np.argmax(wrong)}")
    return words


def _checked_word_labels(column: pa.ChunkedArray, words: pa.Array, name: str, origin: str) -> pa.Array:
    """A label, or null, for each word; rows without a list get nulls."""
    labels = column.combine_chunks()
    lengths = pc.list_value_length(words).to_numpy()
    there = labels.is_valid().to_numpy(zero_copy_only=False)
    found = pc.list_value_length(labels).fill_null(0).to_numpy()
    if (found != lengths)[there].any():
        row = int(np.argmax(there & (found != lengths)))
        raise ValueError(f"{origin}: row {row} has {lengths[row]} words and {found[row]} labels in column {name!r}")
    # Where each word's label lies among those that are there.
    place = np.cumsum(np.repeat(there, lengths)) - 1
    flat = pc.list_flatten(labels).take(pa.array(place, mask=~np.repeat(there, lengths)))
    return _lists(flat, words)


def _language_column(part: Part, chosen: _Columns) -> pa.ChunkedArray | pa.Array:
    table = part.table
    if chosen.language is not None and chosen.language in table.column_names:
        if chosen.language_default is not None:
            raise ValueError(
                f"{part.origin} has a column {chosen.language!r}, so that "
                f"language_default={chosen.language_default!r} is not clear; language=None ignores "
                "the column"
            )
        column = table[chosen.language]
        names = _class_names(table.schema, chosen.language)
        if names is not None:
            return pa.array(names, pa.string()).take(column.combine_chunks())
        if pa.types.is_dictionary(column.type):
            return column.cast(column.type.value_type)
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            # A CSV has no other way to write an empty value.
            return pc.if_else(pc.equal(column, ""), None, column)
        return column
    code = chosen.language_default or part.language
    if code is None:
        raise ValueError(
            f"{part.origin} has no column {chosen.language!r} (argument language); its columns are "
            f"{table.column_names}. For a table of one language give language_default"
        )
    return pa.repeat(pa.scalar(code, pa.string()), table.num_rows)


def _explode(table: pa.Table, sources: Mapping[str, str], origin: str) -> tuple[pa.Array, dict[str, pa.Array]]:
    """Rows of translations as one row per language: source rows, and the columns."""
    if table.num_rows == 0:
        raise ValueError(f"{origin} is empty")
    texts: list[dict[str, tuple[np.ndarray, pa.Array]]] = []
    for source in sources.values():
        column = table[source].combine_chunks()
        fields = {field.name: field.type for field in column.type}
        if set(fields) == {"language", "translation"} and pa.types.is_list(fields["language"]):
            texts.append(_by_language(column))
        else:
            texts.append({})
            for code in fields:
                values = pc.struct_field(column, code)
                rows = np.flatnonzero(values.is_valid().to_numpy(zero_copy_only=False))
                texts[-1][code] = (rows, values.drop_null())
    shared = [code for code in texts[0] if all(code in found for found in texts)]
    if not shared:
        raise ValueError(
            f"{origin}: the columns {list(sources.values())} share no language: {[sorted(found) for found in texts]}"
        )
    row_pieces, code_pieces = [], []
    text_pieces: dict[str, list[pa.Array]] = {name: [] for name in sources}
    for code in shared:
        rows = texts[0][code][0]
        for other, _ in (found[code] for found in texts[1:]):
            rows = np.intersect1d(rows, other)
        for name, found in zip(sources, texts, strict=True):
            source_rows, values = found[code]
            # Of several translations of one text the first counts: searchsorted finds the left end.
            text_pieces[name].append(values.take(np.searchsorted(source_rows, rows)))
        row_pieces.append(rows)
        code_pieces.append(np.full(len(rows), code, dtype=object))
    # Back to the order of the source: all languages of a row beside each other.
    all_rows = np.concatenate(row_pieces)
    order = pa.array(np.argsort(all_rows, kind="stable"))
    columns = {
        name: pa.chunked_array(pieces).cast(pa.large_string()).take(order) for name, pieces in text_pieces.items()
    }
    columns["language"] = pa.array(np.concatenate(code_pieces), pa.string()).take(order)
    return pa.array(all_rows).take(order), columns


def _by_language(column: pa.StructArray) -> dict[str, tuple[np.ndarray, pa.Array]]:
    """Language -> (row numbers, texts) of {"language": [...], "translation": [...]}."""
    codes = pc.struct_field(column, "language")
    rows = pc.list_parent_indices(codes).to_numpy(zero_copy_only=False)
    codes, texts = pc.list_flatten(codes), pc.list_flatten(pc.struct_field(column, "translation"))
    if len(codes) != len(texts):
        raise ValueError(f"a translation column has {len(codes)} languages for {len(texts)} translations")
    result = {}
    for code in codes.unique().to_pylist():
        mask = pc.equal(codes, code)
        result[code] = (rows[mask.to_numpy(zero_copy_only=False)], texts.filter(mask))
    return result


def _choose_languages(tables: Mapping[str, pa.Table], languages: Sequence[str]) -> dict[str, pa.Table]:
    found: Counter[str] = Counter()
    for table in tables.values():
        found.update(_count(table["language"]))
    unknown = [code for code in languages if code not in found]
    if unknown:
        raise ValueError(f"no rows in the languages {unknown}; rows per language: {dict(found)}")
    wanted = pa.array(list(languages), pa.large_string())
    return {split: table.filter(pc.is_in(table["language"], value_set=wanted)) for split, table in tables.items()}


def _with_labels(
    tables: Mapping[str, pa.Table],
    own_names: Sequence[str] | None,
    label_names: Sequence[str] | None,
    extra: Sequence[str],
) -> DatasetDict:
    listed = {split: table["label"].combine_chunks() for split, table in tables.items()}
    words = any(_is_list(column.type) for column in listed.values())
    flat = {split: pc.list_flatten(column) if words else column for split, column in listed.items()}
    ids, names = _label_ids(flat, own_names, label_names)
    result = DatasetDict()
    for split, table in tables.items():
        label = ids[split].cast(pa.int64()).fill_null(UNLABELED_INDEX)
        if words:
            label = _lists(label, listed[split])
        texts = ["text", "text_pair"] if "text_pair" in table.column_names else ["text"]
        data = {name: table[name] for name in texts}
        data |= {"label": label, "language": table["language"]}
        features = Features({name: datasets.List(Value("string")) if words else Value("string") for name in texts})
        features["label"] = datasets.List(ClassLabel(names=names)) if words else ClassLabel(names=names)
        features["language"] = Value("string")
        others = table.select(list(extra))
        features.update(Features.from_arrow_schema(others.schema))
        data |= {name: others[name] for name in extra}
        result[split] = _dataset(pa.table(data), features, split)
    return result


def _label_ids(
    labels: Mapping[str, pa.Array], own_names: Sequence[str] | None, label_names: Sequence[str] | None
) -> tuple[dict[str, Any], list[str]]:
    """Class ids, null without a label, by split; and the names of the classes."""
    columns = {split: _clean_labels(column, split) for split, column in labels.items()}
    is_text = {
        split: pa.types.is_large_string(column.type)
        for split, column in columns.items()
        if column.null_count < len(column)
    }
    if len(set(is_text.values())) > 1:
        shown = {split: "names" if text else "ids" for split, text in is_text.items()}
        raise ValueError(f"labels are ids in one split and names in another: {shown}")
    names = list(label_names or own_names or ())
    if own_names is not None and label_names is not None and set(own_names) != set(label_names):
        raise ValueError(f"label_names={list(label_names)} differ from the set's own label names {list(own_names)}")
    if not is_text and not names:
        raise ValueError("no row has a label; give label_names")
    # Names written as digits (a CSV knows no numbers) are ids, unless they are label names.
    if all(is_text.values()) and not all(_are_ids(column, names) for column in columns.values()):
        found = sorted(
            {name for column in columns.values() for name in column.unique().to_pylist() if name is not None}
        )
        names = names or found
        outside = [name for name in found if name not in names]
        if outside:
            raise ValueError(f"labels outside the label names: {_some(outside)}; the label names are {names}")
        value_set = pa.array(names, pa.large_string())
        columns = {
            split: pc.index_in(column.cast(pa.large_string()), value_set=value_set) for split, column in columns.items()
        }
    else:
        columns = {split: column.cast(pa.int64()) for split, column in columns.items()}
        found_ids = sorted(
            {i for column in columns.values() for i in column.unique().to_pylist() if i not in (None, UNLABELED_INDEX)}
        )
        if not names:
            if found_ids != list(range(len(found_ids))):
                raise ValueError(
                    f"the label ids {_some(found_ids)} are not 0, 1, ... without a gap; give "
                    "label_names (one name for each id from 0), or store names as labels"
                )
            names = [str(i) for i in found_ids]
        outside_ids = [i for i in found_ids if not 0 <= i < len(names)]
        if outside_ids:
            raise ValueError(
                f"label ids outside [0, {len(names)}): {_some(outside_ids)}; the label names are "
                f"{names}, and {UNLABELED_INDEX} means unlabelled"
            )
        if own_names is not None and names != list(own_names):
            # Ids follow the set's own names; the caller asked for another order of the same names.
            position = pa.array([names.index(name) for name in own_names])
            columns = {
                split: position.take(pc.if_else(pc.less(column, 0), None, column)) for split, column in columns.items()
            }
    return columns, names


def _clean_labels(column: pa.ChunkedArray, split: str) -> pa.ChunkedArray:
    """Labels as int64 or large_string with nulls where there is none."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _clean_labels(column.cast(kind.value_type), split)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        column = column.cast(pa.large_string())
        return pc.if_else(pc.equal(column, ""), None, column)
    if pa.types.is_floating(kind):
        # A table that once had empty values beside ids often holds floats with NaN.
        column = pc.if_else(pc.is_nan(column), None, column)
        whole = pc.all(pc.equal(column, pc.floor(column))).as_py()
        if whole is False:
            found = _some(pc.filter(column, pc.not_equal(column, pc.floor(column))).to_pylist())
            raise ValueError(f"labels of split {split!r} are not ids or names: {found}")
    elif not (pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)):
        raise ValueError(f"labels of split {split!r} are {kind}, neither ids nor names")
    return column.cast(pa.int64())


def _are_ids(column: pa.ChunkedArray, names: Sequence[str]) -> bool:
    if not pa.types.is_large_string(column.type):
        return True
    values = [value for value in column.unique().to_pylist() if value is not None]
    if names and all(value in names for value in values):
        return False
    return all(re.fullmatch(r"-?[0-9]+", value) for value in values)


def _some(values: Sequence[Any], most: int = 10) -> str:
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return f"{list(values[:most])}{more}"


def _quotas(sizes: np.ndarray, fraction: float) -> np.ndarray:
    """Shares of whole rows, at least one each, that add up to `fraction` (largest remainder)."""
    exact = sizes * fraction
    quotas = np.maximum(np.floor(exact), 1 if fraction > 0 else 0).astype(np.int64)
    missing = max(0, round(float(exact.sum())) - int(quotas.sum()))
    quotas[np.argsort(quotas - exact, kind="stable")[:missing]] += 1
    return quotas


def _most_of_each_row(column: pa.ChunkedArray) -> np.ndarray:
    """The largest label of each list: UNLABELED_INDEX where no word has one."""
    lengths = pc.list_value_length(column).to_numpy()
    return np.maximum.reduceat(pc.list_flatten(column).to_numpy(), np.cumsum(lengths) - lengths)


def _count(column: pa.ChunkedArray) -> dict[str, int]:
    return {item["values"]: item["counts"] for item in column.value_counts().to_pylist()}


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    """An int for each distinct value, empty ones too, in the order of their first rows."""
    encoded = column.combine_chunks().dictionary_encode(null_encoding="encode")
    return cast(np.ndarray, encoded.indices.to_numpy())


def _table(dataset: Dataset) -> pa.Table:
    return dataset.with_format("arrow")[:]


def _dataset(table: pa.Table, features: Features, split: Any) -> Dataset:
    """A data set in memory. One way of chunking, so that the fingerprint is the content's."""
    table = table.select(list(features)).combine_chunks()
    batches = [batch.cast(features.arrow_schema) for batch in table.to_batches(max_chunksize=_CHUNK_ROWS)]
    table = pa.Table.from_batches(batches, schema=features.arrow_schema)
    info = datasets.DatasetInfo(features=features)
    return Dataset(table, info=info, split=datasets.NamedSplit(str(split)) if split else None)


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> str:
    """What decides about the token ids, without the padding and truncation of the last call."""
    if not tokenizer.is_fast:
        return str(Hasher.hash((type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer.init_kwargs)))
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["padding"] = state["truncation"] = None
    return str(Hasher.hash((state, tokenizer.model_input_names, tokenizer.truncation_side)))
