"""The language of each row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from amtss_fast.data.arrow import blank_to_null, count_values, has_label, is_text, table_of
from amtss_fast.data.file_names import one_spelling
from amtss_fast.data.labels import class_names
from amtss_fast.data.sources import Part
from amtss_fast.errors import UserError
from amtss_fast.models.names import check_code


def language_counts(dataset: Dataset) -> dict[str, int]:
    """The number of rows of each language, in the order of their first rows."""
    return count_values(table_of(dataset.select_columns("language"))["language"])


def label_counts(dataset: Dataset) -> dict[str, int]:
    """The number of rows with a label of each language, in the order of their first rows; 0 where no row has one."""
    table = table_of(dataset.select_columns(["language", "label"]))
    labels = table["label"].combine_chunks()
    counts = dict.fromkeys(count_values(table["language"]), 0)
    return counts | count_values(table["language"].filter(pa.array(has_label(labels))))


def language_column(part: Part, name: str | None, default: str | None) -> pa.ChunkedArray | pa.Array:
    """The languages of a table's rows: its column `name`, else `default`, else what the name of its file says.

    Raises:
        UserError: none of these, or both the column and `default`.
    """
    table = part.table
    if name is not None and name in table.column_names:
        if default is not None:
            raise UserError(
                f"{part.origin} has a column {name!r}, so that language_default={default!r} is not clear; "
                "language=None ignores the column"
            )
        return _as_text(table, name)
    code = default or part.language
    if code is None:
        raise UserError(
            f"{part.origin} has no column {name!r} (argument language); its columns are {table.column_names}. Its name "
            "gives no known language code. For a table of one language give language_default; for files that are "
            "called by codes of your own give languages"
        )
    return pa.repeat(pa.scalar(code, pa.string()), table.num_rows)


def check_codes(column: pa.ChunkedArray, origin: str) -> None:
    """Raises UserError for a language code with other characters than letters, digits, - and _."""
    for code in count_values(column):
        try:
            check_code(code)
        except UserError as error:
            raise UserError(f"{origin}: {error}") from error


def check_spelling(tables: Mapping[str, pa.Table]) -> None:
    """Raises UserError for one language in two spellings, such as `pt_BR` and `pt-BR`."""
    one_spelling([code for table in tables.values() for code in count_values(table["language"])], "the languages")


def choose_languages(tables: Mapping[str, pa.Table], languages: Sequence[str]) -> dict[str, pa.Table]:
    """The rows in these languages. Raises UserError for a language without rows in any split."""
    found: Counter[str] = Counter()
    for table in tables.values():
        found.update(count_values(table["language"]))
    unknown = [code for code in languages if code not in found]
    if unknown:
        raise UserError(f"no rows in the languages {unknown}; rows per language: {dict(found)}")
    wanted = pa.array(list(languages), pa.large_string())
    return {split: table.filter(pc.is_in(table["language"], value_set=wanted)) for split, table in tables.items()}


def _as_text(table: pa.Table, name: str) -> pa.ChunkedArray | pa.Array:
    column = table[name]
    names = class_names(table.schema, name)
    if names is not None:
        return pa.array(names, pa.string()).take(column.combine_chunks())
    return blank_to_null(column) if is_text(column.type) else column
