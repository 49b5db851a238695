"""Any labeled multilingual data set in the standard shape: text, optional text_pair, label, language."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, DatasetDict, Features, Value

from amtss_fast.data.arrow import count_values, dataset_of, in_lists, is_list
from amtss_fast.data.columns import Columns, standard_table
from amtss_fast.data.labels import label_ids, own_label_names
from amtss_fast.data.languages import check_spelling, choose_languages
from amtss_fast.data.sources import EMBEDDED, Part, Source, is_embedded, read_parts
from amtss_fast.data.splits import SPLIT_ORDER
from amtss_fast.errors import UserError


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
    """Reads a labeled multilingual data set into the standard shape.

    Each split of the result has the columns `text` (str), `text_pair` (str, only if there are two text columns),
    `label` (ClassLabel, -1 = unlabeled), `language` (str) and the columns of `keep`. It is held in memory, and its
    fingerprint depends on its content alone.

    `name_or_path` is one of:

    - `"cldr_topic"` or `"cldr_pairs"`, the embedded sets (see `embedded/README.md`);
    - `"xnli"`: `facebook/xnli` from the Hub. `config` is `"all_languages"` or one language; without it the
      configurations of `languages` are read, or `all_languages`;
    - a local file, folder, glob pattern, a list of these, or a mapping from split to these. Formats: .csv and .tsv with
      a header, JSON lines (.jsonl, .ndjson, .json), .parquet, and folders that `save_to_disk` of `datasets` wrote;
    - any other Hub id; `config` and `**hub` (`revision`, `token`, ...) go to `datasets.load_dataset`.

    Text files are UTF-8, with or without a BOM. Blank lines are skipped; any other line is a row or an error. A CSV has
    texts with commas, quotes or line ends in quotes, and quotes in them doubled. In a .tsv quotes are characters like
    others, and no text has a tab or a line end.

    In local tables the split comes from the mapping, else from the name of the file or of a folder (train, validation,
    valid, val, dev, test; at its end, or with a language code alone behind it), else from `split_column` where the
    table has it; else all rows are `train`.

    The language comes from the column `language`, else from `language_default`, else from the name of a local file or
    folder (`en/train.parquet`, `train.pt-BR.csv`). A name counts that is one of `languages` (`_` and `-` are alike; it
    comes out as given there) or a code of ISO 639 with a script or region, in their usual capitals: `eng_Latn`,
    `es-419`. Translation columns, as in XNLI's `all_languages` (`{"en": text, ...}` or `{"language": [...],
    "translation": [...]}`), become one row for each language in which all text columns are given.

    A text column that holds lists of words makes a set for token classification: `text` holds lists of str, and `label`
    lists of ClassLabel of the same lengths, read from a label column of such lists. A row whose list of labels is
    missing is unlabeled.

    Labels may be class ids or names, whatever the file: an id may be written 1, 1.0, "1" or "1.0". Labels that are all
    among `label_names` are names; otherwise they are ids if all are whole numbers, and names if not. Names get ids in
    sorted order, or in the order of `label_names`; a set that carries its own names keeps them, and with `label_names`
    is aligned by name. Without any names the ids must be 0, 1, ... without a gap. Names are compared without case,
    outer blanks and Unicode form; two spellings of one name in the data are an error, or one name if only blanks or the
    Unicode form differ.

    A label that is missing (null, NaN, an empty field) or -1 means unlabeled. Among ids the texts nan, none, null, NA,
    N/A, <NA> and NaT are missing labels too. Among names they stay names; "nan", "NaN", "<NA>" and "NaT" must then
    stand in `label_names`. `label=None` reads a set that has no labels.

    Args:
        text, text_pair: names of the text columns. Without them `text`, or `premise` and `hypothesis` in a table that
            has these and no `text`.
        languages: keeps these languages only, in all splits.
        splits: keeps these splits only; a mapping {new name: name in the source} renames too.
        keep: further columns to keep as they are.

    Raises:
        FileNotFoundError: a path or a Hub set that does not exist, an unknown name.
        UserError: a missing column, an unknown language, a label outside the label names, an empty split, an unreadable
            file; the message shows what was found.
        TypeError: one string in place of a sequence; arguments for the Hub with another source.
    """
    if isinstance(label_names, str) or isinstance(languages, str) or isinstance(keep, str):
        raise TypeError("label_names, languages and keep are sequences of names, not one string")
    if label is None and label_names is None:
        raise UserError("label=None (a set without labels) needs label_names")
    if text is None and text_pair is not None:
        raise UserError(f"text_pair={text_pair!r} needs text, the name of the first text column")
    if is_embedded(name_or_path):
        split_column = "split"
        if text is None:
            text, text_pair = EMBEDDED[str(name_or_path)]
    chosen = Columns(text, text_pair, label, language, language_default, tuple(keep))
    parts = read_parts(name_or_path, split_column=split_column, languages=languages, config=config, hub=hub)
    parts = _choose_splits(parts, splits, name_or_path)
    for split in parts:
        # `datasets` allows no others.
        if not re.fullmatch(r"\w+(\.\w+)*", split):
            raise UserError(f"{name_or_path}: a split cannot be called {split!r}; letters, digits, _ and . are allowed")
    own_names = own_label_names(parts, label)
    tables = {split: standard_table(parts[split], chosen) for split in parts}
    if languages is not None:
        tables = choose_languages(tables, languages)
    check_spelling(tables)
    for split, table in tables.items():
        if table.num_rows == 0:
            found = {name: count_values(table["language"]) for name, table in tables.items()}
            raise UserError(f"split {split!r} is empty; rows per split and language: {found}")
    try:
        return _with_labels(tables, own_names, label_names, chosen.extra)
    except UserError as error:
        raise UserError(f"{name_or_path}: {error}") from error


def _choose_splits(
    parts: dict[str, list[Part]],
    splits: Sequence[str] | Mapping[str, str] | None,
    source: Source,
) -> dict[str, list[Part]]:
    if splits is None:
        order = [split for split in SPLIT_ORDER if split in parts]
        return {split: parts[split] for split in (*order, *(s for s in parts if s not in order))}
    if isinstance(splits, str):
        raise TypeError(f"splits is a sequence or a mapping, not one string: {splits!r}")
    wanted = dict(splits) if isinstance(splits, Mapping) else {name: name for name in splits}
    unknown = sorted(set(wanted.values()) - set(parts))
    if unknown:
        raise UserError(f"{source!r} has no split {unknown}; it has {list(parts)}")
    return {new: parts[old] for new, old in wanted.items()}


def _with_labels(
    tables: Mapping[str, pa.Table],
    own_names: Sequence[str] | None,
    label_names: Sequence[str] | None,
    extra: Sequence[str],
) -> DatasetDict:
    """The data sets of standard tables, with labels as class ids."""
    found = {split: table["label"].combine_chunks() for split, table in tables.items()}
    words = any(is_list(column.type) for column in found.values())
    flat = {split: pc.list_flatten(column) if words else column for split, column in found.items()}
    ids, names = label_ids(flat, own_names, label_names)
    result = DatasetDict()
    for split, table in tables.items():
        label = ids[split]
        data = {
            **{name: table[name] for name in ("text", "text_pair") if name in table.column_names},
            "label": in_lists(label, found[split]) if words else label,
            "language": table["language"],
        }
        features = Features(
            {
                **{name: Value("string") for name in data},
                "label": ClassLabel(names=names),
            }
        )
        if words:
            features.update({name: datasets.List(features[name]) for name in ("text", "label")})
        others = table.select(list(extra))
        features.update(Features.from_arrow_schema(others.schema))
        data |= {name: others[name] for name in extra}
        result[split] = dataset_of(pa.table(data), features, split)
    return result
