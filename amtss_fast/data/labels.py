"""What a label is: ids or names as found, turned into class ids 0 to C - 1 with a name for each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, DatasetDict, Features, List

from amtss_fast.data.arrow import dataset_of, in_lists, is_list, is_text, table_of
from amtss_fast.data.label_values import (
    UNLABELED,
    as_id,
    check_names_found,
    different_keys,
    is_id,
    is_number,
    label_key,
    label_text,
)
from amtss_fast.data.sources import Part
from amtss_fast.errors import UserError
from amtss_fast.loss.options import UNLABELED_INDEX
from amtss_fast.models.names import normalize_label, show_names


def own_label_names(parts: Mapping[str, list[Part]], label: str | None) -> list[str] | None:
    """The label names that the tables carry in their metadata; None if no table carries any.

    Raises:
        UserError: two tables carry different names.
    """
    found: dict[tuple[str, ...], str] = {}
    for part in (part for listed in parts.values() for part in listed):
        metadata = part.table.schema.metadata or {}
        names = class_names(part.table.schema, label)
        if names is None and b"labels" in metadata:
            names = json.loads(metadata[b"labels"])
        if names is not None:
            found.setdefault(tuple(names), part.origin)
    if len(found) > 1:
        shown = "; ".join(f"{origin}: {list(names)}" for names, origin in found.items())
        raise UserError(f"the tables carry different label names: {shown}")
    return list(next(iter(found))) if found else None


def class_names(schema: pa.Schema, column: str | None) -> list[str] | None:
    """The names of a ClassLabel column in a table that `datasets` wrote; None for any other column."""
    if b"huggingface" not in (schema.metadata or {}):
        return None
    try:
        feature = Features.from_arrow_schema(schema).get(column)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"this version of datasets cannot read the table's features: {error}") from error
    feature = getattr(feature, "feature", feature)
    return list(feature.names) if isinstance(feature, ClassLabel) else None


@dataclass(frozen=True)
class _Column:
    """The labels of one split as found."""

    texts: list[str | None]
    """The distinct labels, see `label_text`."""
    codes: pa.Array
    """[N] for each row the place of its label in `texts`."""
    numeric: bool

    @classmethod
    def of(cls, column: pa.Array, split: str) -> _Column:
        kind = column.type
        numeric = pa.types.is_boolean(kind) or pa.types.is_integer(kind)
        numeric = numeric or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
        if not (numeric or is_text(kind) or pa.types.is_null(kind)):
            raise UserError(f"labels of split {split!r} are {kind}, neither ids nor names")
        encoded = column.dictionary_encode(null_encoding="encode")
        return cls([label_text(value) for value in encoded.dictionary.to_pylist()], encoded.indices, numeric)

    @property
    def found(self) -> list[str]:
        """The distinct labels that are not missing."""
        return [text for text in self.texts if text is not None]

    def ids(self, of: Mapping[str, int]) -> pa.Array:
        """[N] int64, -1 for a missing label."""
        places = [UNLABELED_INDEX if text is None else of[text] for text in self.texts]
        return pa.array(places, pa.int64()).take(self.codes)


def label_ids(
    labels: Mapping[str, pa.Array], own_names: Sequence[str] | None, label_names: Sequence[str] | None
) -> tuple[dict[str, pa.Array], list[str]]:
    """Class ids by split, and the C names of the classes.

    Labels are names if all of them are among the names (-1 and missing ones apart), else ids if all are whole numbers,
    else names. The meaning is one for all splits.

    Args:
        labels: {split: labels as found}, ids or names.
        own_names: the names that the tables carry, in the order of their ids.
        label_names: the names that the caller gives, in the order of the ids of the result.

    Returns:
        {split: [N] int64 with -1 for unlabeled}, and the names.

    Raises:
        UserError: labels that are neither ids nor names, or outside the names; ids with a gap and no names for them;
            numbers that could be ids as well as names.
    """
    columns = {split: _Column.of(column, split) for split, column in labels.items()}
    found = list(dict.fromkeys(text for column in columns.values() for text in column.found))
    carried = own_names is not None and all(column.numeric or not column.found for column in columns.values())
    places = {} if label_names is None else different_keys(label_names, "label_names")
    if own_names is not None:
        _check_own_names(own_names, places, label_names)
    if own_names is not None and carried:
        ids, names = _of_ids(found, own_names)
        if label_names is not None:
            names = list(label_names)
            moved = [places[label_key(name)] for name in own_names]
            ids = {text: i if i < 0 else moved[i] for text, i in ids.items()}
    else:
        ids, names = _of_texts(found, columns, label_names or own_names)
    return {split: column.ids(ids) for split, column in columns.items()}, names


def align_labels(data: DatasetDict, names: Sequence[str]) -> DatasetDict:
    """The data with its label ids as places in `names`; labels are aligned by name.

    Raises:
        UserError: a label name of the data that is not in `names`; the message has both lists.
    """
    feature = next(iter(data.values())).features["label"]
    own = getattr(feature, "feature", feature).names
    places = different_keys(names, "label_names")
    outside = [name for name in own if label_key(name) not in places]
    if outside:
        raise UserError(
            f"labels that the model does not have: {_some(outside)}; the labels of the data are "
            f"{show_names(own, names)}, those of the model {show_names(names, own)}"
        )
    if list(own) == list(names):
        return data
    moved = pa.array([places[label_key(name)] for name in own], pa.int64())
    return DatasetDict({split: _with_names(rows, moved, names) for split, rows in data.items()})


def _with_names(rows: Dataset, moved: pa.Array, names: Sequence[str]) -> Dataset:
    table = table_of(rows)
    column = table["label"].combine_chunks()
    words = is_list(column.type)
    ids = pc.list_flatten(column) if words else column
    ids = moved.take(pc.if_else(pc.less(ids, 0), None, ids)).fill_null(UNLABELED_INDEX)
    label = ClassLabel(names=list(names))
    features = Features({**rows.features, "label": List(label) if words else label})
    table = table.set_column(table.column_names.index("label"), "label", in_lists(ids, column) if words else ids)
    return dataset_of(table, features, rows.split)


def _check_own_names(own: Sequence[str], places: Mapping[str, int], label_names: Sequence[str] | None) -> None:
    different_keys(own, "the set's own label names")
    if label_names is not None and any(label_key(name) not in places for name in own):
        raise UserError(f"label_names={list(label_names)} differ from the set's own label names {list(own)}")


def _of_texts(
    found: Sequence[str], columns: Mapping[str, _Column], given: Sequence[str] | None
) -> tuple[dict[str, int], list[str]]:
    """{label: its id}, and the names."""
    places = {} if given is None else different_keys(given, "label_names")
    labels = [text for text in found if label_key(text) in places or label_key(text) != UNLABELED]
    if not labels and not places:
        raise UserError("no row has a label; give label_names")
    # Words for a missing number mean that only beside numbers.
    by_id = all(map(is_id, labels)) and any(map(is_number, labels))
    if places and all(label_key(text) in places for text in labels):
        _check_one_meaning(labels, columns, places)
    elif by_id:
        return _of_ids(found, given)
    else:
        _check_kinds(columns)
    if given is None:
        check_names_found(sorted(labels), "the labels")
        places = {label_key(text): place for place, text in enumerate(sorted(labels))}
    names = sorted(labels) if given is None else list(given)
    outside = sorted(text for text in labels if label_key(text) not in places)
    if outside:
        shown = f"{show_names(outside[:10], names)}{_more(outside)}"
        raise UserError(f"labels outside the label names: {shown}; the label names are {show_names(names, outside)}")
    return {text: places.get(label_key(text), UNLABELED_INDEX) for text in found}, names


def _of_ids(found: Sequence[str], given: Sequence[str] | None) -> tuple[dict[str, int], list[str]]:
    """The ids of labels that are ids, and the names; without names "0", "1", ..."""
    wrong = [text for text in found if not is_id(text)]
    if wrong:
        raise UserError(f"labels are not ids or names: {_some(wrong)}")
    ids = {text: as_id(text) for text in found}
    classes = sorted({i for i in ids.values() if i != UNLABELED_INDEX})
    if given is None and classes != list(range(len(classes))):
        raise UserError(
            f"the label ids {_some(classes)} are not 0, 1, ... without a gap; give "
            "label_names (one name for each id from 0), or store names as labels"
        )
    names = [str(i) for i in classes] if given is None else list(given)
    outside = [i for i in classes if not 0 <= i < len(names)]
    if outside:
        raise UserError(
            f"label ids outside [0, {len(names)}): {_some(outside)}; the label names are "
            f"{names}, and {UNLABELED_INDEX} means unlabeled"
        )
    return ids, names


def _check_one_meaning(labels: Sequence[str], columns: Mapping[str, _Column], places: Mapping[str, int]) -> None:
    """Numbers may be ids as well as names, of other classes. A text that stands among the names as it is, is a name."""
    exact = {normalize_label(text) for text in labels} <= set(places)
    if exact and not any(column.numeric for column in columns.values()):
        return
    as_ids = {text: as_id(text) for text in labels if is_id(text)}
    if len(as_ids) < len(labels) or not all(UNLABELED_INDEX <= i < len(places) for i in as_ids.values()):
        return
    if any(places[label_key(text)] != i for text, i in as_ids.items()):
        raise UserError(
            f"the labels {_some(sorted(as_ids))} are numbers that may be ids or names; the label names are "
            f"{list(places)}; store the names as labels, written as they are here"
        )


def _check_kinds(columns: Mapping[str, _Column]) -> None:
    """Labels that are names must be texts in all splits."""
    numeric = {split: column.numeric for split, column in columns.items() if column.found}
    wrong = {split: [text for text in columns[split].found if not is_id(text)] for split, n in numeric.items() if n}
    for split, found in wrong.items():
        if found:
            raise UserError(f"labels of split {split!r} are not ids or names: {_some(found)}")
    if len(set(numeric.values())) > 1:
        shown = {split: "ids" if n else "names" for split, n in numeric.items()}
        raise UserError(f"labels are ids in one split and names in another: {shown}")


def _some(values: Sequence[Any], most: int = 10) -> str:
    return f"{list(values[:most])}{_more(values, most)}"


def _more(values: Sequence[Any], most: int = 10) -> str:
    return f" and {len(values) - most} more" if len(values) > most else ""
