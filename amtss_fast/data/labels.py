"""What a label is: ids or names as found, turned into class ids 0 to C - 1 with a name for each."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Features

from amtss_fast.data.arrow import blank_to_null, is_text
from amtss_fast.data.sources import Part
from amtss_fast.errors import UserError
from amtss_fast.loss.options import UNLABELED_INDEX


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
    feature = Features.from_arrow_schema(schema).get(column)
    feature = getattr(feature, "feature", feature)
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def label_ids(
    labels: Mapping[str, pa.Array], own_names: Sequence[str] | None, label_names: Sequence[str] | None
) -> tuple[dict[str, pa.Array], list[str]]:
    """Class ids by split, and the C names of the classes.

    Args:
        labels: {split: labels as found}, ids or names.
        own_names: the names that the tables carry, in the order of their ids.
        label_names: the names that the caller gives, in the order of the ids of the result.

    Returns:
        {split: [N] int64 with null or -1 for unlabeled}, and the names.

    Raises:
        UserError: labels that are neither ids nor names, or outside the names; ids with a gap and no names for them.
    """
    columns = {split: _clean(column, split) for split, column in labels.items()}
    texts = {split: is_text(column.type) for split, column in columns.items() if column.null_count < len(column)}
    if len(set(texts.values())) > 1:
        shown = {split: "names" if text else "ids" for split, text in texts.items()}
        raise UserError(f"labels are ids in one split and names in another: {shown}")
    if own_names is not None and label_names is not None and set(own_names) != set(label_names):
        raise UserError(f"label_names={list(label_names)} differ from the set's own label names {list(own_names)}")
    names = list(label_names or own_names or ())
    if not texts and not names:
        raise UserError("no row has a label; give label_names")
    # Names written as digits (a CSV has no numbers) are ids, unless they are label names.
    if all(texts.values()) and not all(_are_ids(column, names) for column in columns.values()):
        return _ids_of_names(columns, names)
    columns, names = _checked_ids(columns, names)
    if own_names is not None and names != list(own_names):
        columns = _reordered(columns, own_names, names)
    return columns, names


def _clean(column: pa.Array, split: str) -> pa.Array:
    """Labels as int64 or large_string, null where there is none."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _clean(column.cast(kind.value_type), split)
    if is_text(kind):
        return blank_to_null(column.cast(pa.large_string()))
    if pa.types.is_floating(kind):
        # A table that once had missing values beside ids often holds floats with NaN.
        column = pc.if_else(pc.is_nan(column), None, column)
        whole = pc.equal(column, pc.floor(column))
        if pc.all(whole).as_py() is False:
            found = _some(pc.filter(column, pc.invert(whole)).to_pylist())
            raise UserError(f"labels of split {split!r} are not ids or names: {found}")
    elif not (pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)):
        raise UserError(f"labels of split {split!r} are {kind}, neither ids nor names")
    return column.cast(pa.int64())


def _are_ids(column: pa.Array, names: Sequence[str]) -> bool:
    if not is_text(column.type):
        return True
    values = _distinct(column)
    if names and all(value in names for value in values):
        return False
    return all(re.fullmatch(r"-?[0-9]+", value) for value in values)


def _ids_of_names(columns: Mapping[str, pa.Array], names: list[str]) -> tuple[dict[str, pa.Array], list[str]]:
    """The place of each label in the names; without names in the sorted labels."""
    found = sorted({name for column in columns.values() for name in _distinct(column)})
    names = names or found
    outside = [name for name in found if name not in names]
    if outside:
        raise UserError(f"labels outside the label names: {_some(outside)}; the label names are {names}")
    value_set = pa.array(names, pa.large_string())
    return {s: pc.index_in(column.cast(pa.large_string()), value_set=value_set) for s, column in columns.items()}, names


def _checked_ids(columns: Mapping[str, pa.Array], names: list[str]) -> tuple[dict[str, pa.Array], list[str]]:
    """The ids as int64, each with a name; without names "0", "1", ..."""
    ids = {split: column.cast(pa.int64()) for split, column in columns.items()}
    found = sorted({i for column in ids.values() for i in _distinct(column) if i != UNLABELED_INDEX})
    if not names:
        if found != list(range(len(found))):
            raise UserError(
                f"the label ids {_some(found)} are not 0, 1, ... without a gap; give "
                "label_names (one name for each id from 0), or store names as labels"
            )
        names = [str(i) for i in found]
    outside = [i for i in found if not 0 <= i < len(names)]
    if outside:
        raise UserError(
            f"label ids outside [0, {len(names)}): {_some(outside)}; the label names are "
            f"{names}, and {UNLABELED_INDEX} means unlabeled"
        )
    return ids, names


def _reordered(columns: Mapping[str, pa.Array], old: Sequence[str], new: Sequence[str]) -> dict[str, pa.Array]:
    """Ids in the order of the old names as ids in the order of the new ones."""
    position = pa.array([new.index(name) for name in old])
    return {split: position.take(pc.if_else(pc.less(column, 0), None, column)) for split, column in columns.items()}


def _distinct(column: pa.Array) -> list[Any]:
    return [value for value in column.unique().to_pylist() if value is not None]


def _some(values: Sequence[Any], most: int = 10) -> str:
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return f"{list(values[:most])}{more}"
