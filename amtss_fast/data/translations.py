"""Columns of translations, as in XNLI's `all_languages`, as one row per language."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from amtss_fast.data.arrow import is_list, is_text
from amtss_fast.errors import UserError

# Language -> (numbers of the rows that have a text in it, those texts).
_Translations: TypeAlias = dict[str, tuple[np.ndarray, pa.Array]]


def split_translations(
    table: pa.Table, sources: Mapping[str, str], origin: str
) -> tuple[pa.Array, dict[str, pa.Array]]:
    """One row for each language in which all text columns of a source row are given.

    Args:
        table: has struct columns, `{"en": text, ...}` or `{"language": [...], "translation": [...]}`.
        sources: {name of the new text column: name of its source in `table`}.
        origin: what messages call the table.

    Returns:
        The number of the source row of each new row, and the new columns: the texts and `language`. The languages of
        one source row stand side by side, in the order of the source rows.

    Raises:
        UserError: no rows; no language that all columns have; unequal numbers of languages and translations.
    """
    if table.num_rows == 0:
        raise UserError(f"{origin} is empty")
    texts = [
        _translations(table[source].combine_chunks(), f"{origin}: column {source!r}") for source in sources.values()
    ]
    shared = [code for code in texts[0] if all(code in found for found in texts)]
    if not shared:
        raise UserError(
            f"{origin}: the columns {list(sources.values())} share no language: {[sorted(found) for found in texts]}"
        )
    row_pieces, code_pieces = [], []
    text_pieces: dict[str, list[pa.Array]] = {name: [] for name in sources}
    for code in shared:
        rows = texts[0][code][0]
        for found in texts[1:]:
            rows = np.intersect1d(rows, found[code][0])
        for name, found in zip(sources, texts, strict=True):
            source_rows, values = found[code]
            # searchsorted finds the left end: of several translations of one text the first counts.
            text_pieces[name].append(values.take(np.searchsorted(source_rows, rows)))
        row_pieces.append(rows)
        code_pieces.append(np.full(len(rows), code, dtype=object))
    all_rows = np.concatenate(row_pieces)
    order = pa.array(np.argsort(all_rows, kind="stable"))
    columns = {
        name: pa.chunked_array(pieces).cast(pa.large_string()).take(order) for name, pieces in text_pieces.items()
    }
    columns["language"] = pa.array(np.concatenate(code_pieces), pa.string()).take(order)
    return pa.array(all_rows).take(order), columns


def _translations(column: pa.StructArray, place: str) -> _Translations:
    fields = {field.name: field.type for field in column.type}
    if set(fields) == {"language", "translation"} and is_list(fields["language"]):
        return _of_lists(column, place)
    return {code: _of_field(column, code, place) for code in fields}


def _of_field(column: pa.StructArray, code: str, place: str) -> tuple[np.ndarray, pa.Array]:
    values = pc.struct_field(column, code)
    _check_text(values.type, code, place)
    return np.flatnonzero(values.is_valid().to_numpy(zero_copy_only=False)), values.drop_null()


def _check_text(kind: pa.DataType, field: str, place: str) -> None:
    if not (is_text(kind) or pa.types.is_null(kind)):
        raise UserError(f"{place} holds {kind} in {field!r}, not text")


def _of_lists(column: pa.StructArray, place: str) -> _Translations:
    codes = pc.struct_field(column, "language")
    rows = pc.list_parent_indices(codes).to_numpy(zero_copy_only=False)
    codes, texts = pc.list_flatten(codes), pc.list_flatten(pc.struct_field(column, "translation"))
    _check_text(texts.type, "translation", place)
    if len(codes) != len(texts):
        raise UserError(f"{place} has {len(codes)} languages for {len(texts)} translations")
    result = {}
    for code in codes.unique().to_pylist():
        mask = pc.equal(codes, code)
        result[code] = (rows[mask.to_numpy(zero_copy_only=False)], texts.filter(mask))
    return result
