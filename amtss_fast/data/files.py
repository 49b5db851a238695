"""One local data file as an Arrow table."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from amtss_fast.errors import UserError

FORMATS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
# Bytes of a CSV and rows of a JSON file that are read at once.
_CSV_BLOCK = 1 << 24
_JSON_CHUNK = 50_000


def file_format(file: Path) -> str:
    """The suffix in lower case."""
    return file.suffix.lower()


def read_file(file: Path) -> pa.Table:
    """A file as a table with different column names.

    Raises:
        UserError: a broken file, or a column that stands there twice.
    """
    readers: dict[str, Callable[[Path], pa.Table]] = {
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".parquet": pa.parquet.read_table,
    }
    try:
        table = readers.get(file_format(file), _read_json_lines)(file)
    except (pa.ArrowException, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} cannot be read as {file_format(file)}: {error}") from error
    names = Counter(table.column_names)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise UserError(f"{file} has columns twice: {twice}")
    return table


def _read_csv(file: Path) -> pa.Table:
    delimiter = "\t" if file_format(file) == ".tsv" else ","
    with file.open(encoding="utf-8-sig", newline="") as lines:
        header = next(csv.reader(lines, delimiter=delimiter), None)
    if header is None:
        raise UserError(f"{file} is empty: it has no header line")
    # Everything is text here: a text "NA", "001" or "2020-01-01" must stay what it is.
    return pa.csv.read_csv(
        file,
        read_options=pa.csv.ReadOptions(block_size=_CSV_BLOCK),
        parse_options=pa.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(
            column_types={name: pa.string() for name in header}, strings_can_be_null=False
        ),
    )


def _read_json_lines(file: Path) -> pa.Table:
    # Arrow's own reader turns texts that look like dates into dates.
    def chunks() -> Iterator[pa.Table]:
        rows: list[dict[str, Any]] = []
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                rows.append(_json_row(line, f"{file}, line {number}"))
                if len(rows) == _JSON_CHUNK:
                    yield _rows_table(rows)
                    rows = []
        yield _rows_table(rows)

    return pa.concat_tables(list(chunks()), promote_options="permissive")


def _json_row(line: str, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise UserError(f"{place} is not a JSON object (one object per line is expected): {line.strip()[:80]}")
    return row


def _rows_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    # `Table.from_pylist` takes the columns of the first row only.
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})
