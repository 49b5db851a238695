"""One local data file as an Arrow table. Nothing is guessed, joined or dropped: what is unclear is an error."""

from __future__ import annotations

import csv
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import torch

from amtss_fast._system.memory import available
from amtss_fast.data.arrow import plain_table, table_of
from amtss_fast.data.lines import json_rows, read_lines
from amtss_fast.errors import UserError

FORMATS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
# What `Dataset.save_to_disk` writes into its folder.
SAVED = "state.json"
# What `DatasetDict.save_to_disk` writes beside the folders of its splits.
SAVED_SPLITS = "dataset_dict.json"
# Rows of a text file that are read at once.
_CHUNK = 50_000
# Rows of a Parquet file that are read at once.
_BATCH = 16_384
# `"he said ""hi"" to me"`: a text with quotes, as a CSV has it.
_QUOTED = re.compile(r'"[^"]*(""[^"]*)+"')


def file_format(file: Path) -> str:
    """The suffix in lower case, or the name of the file that marks a saved data set."""
    return SAVED if file.is_dir() else file.suffix.lower()


def read_file(file: Path) -> pa.Table:
    """A file, or a folder that `Dataset.save_to_disk` wrote, as a table with different column names.

    Raises:
        UserError: a broken or empty file, or a column that stands there twice; the message has the file, and the line
            where there is one.
    """
    readers: dict[str, Callable[[Path], pa.Table]] = {
        ".csv": _read_csv,
        ".tsv": _read_tsv,
        ".parquet": _read_parquet,
        SAVED: _read_saved,
    }
    kind = file_format(file)
    if kind != SAVED and file.stat().st_size == 0:
        raise UserError(f"{file} is empty: it has no bytes")
    try:
        table = plain_table(readers.get(kind, _read_json_lines)(file))
    except (UserError, FileNotFoundError):
        raise
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, OverflowError) as error:
        shown = "a saved data set" if kind == SAVED else kind
        raise UserError(f"{file} cannot be read as {shown}: {' '.join(str(error).split())}") from error
    _check_names(table.column_names, str(file))
    if table.num_rows == 0:
        raise UserError(f"{file} is empty: it has no rows; its columns are {table.column_names}")
    return table


def _check_names(names: Sequence[str], origin: str) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{origin} has columns twice: {twice}")


def _read_parquet(file: Path) -> pa.Table:
    # `read_table` would take columns from names of folders such as `label=1`.
    with pa.parquet.ParquetFile(file) as source:
        table = pa.Table.from_batches(_bounded(source, file), source.schema_arrow)
    # Arrow checks neither UTF-8 nor offsets when it reads.
    table.validate(full=True)
    return table


def _bounded(source: pa.parquet.ParquetFile, file: Path) -> Iterator[pa.RecordBatch]:
    """The rows as long as there is memory for them: a few bytes may stand for any number of rows."""
    declared, free = source.metadata, available(torch.device("cpu"))
    groups = [declared.row_group(i) for i in range(declared.num_row_groups)]
    # Sizes may lie, and equal values take no space in the file, but in memory each has a bit at least.
    least = max(sum(group.total_byte_size for group in groups), declared.num_rows * declared.num_columns // 8)
    _check_fits(file, declared, least, free)
    size = 0
    for batch in source.iter_batches(_BATCH):
        size += batch.nbytes
        _check_fits(file, declared, size, free)
        yield batch


def _check_fits(file: Path, declared: pa.parquet.FileMetaData, size: int, free: int) -> None:
    if size > free:
        raise UserError(
            f"{file} does not fit into memory: {declared.num_rows:,} rows of {declared.num_columns} columns, "
            f"at least {size / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free"
        )


def _read_saved(folder: Path) -> pa.Table:
    table = table_of(datasets.load_from_disk(str(folder)))
    table.validate(full=True)
    return table


def _read_json_lines(file: Path) -> pa.Table:
    # Arrow's own reader turns texts that look like dates into dates.
    rows = json_rows(read_lines(file, str(file)), str(file))
    chunks = [_rows_table(chunk) for chunk in iter(lambda: list(islice(rows, _CHUNK)), [])]
    return pa.concat_tables(chunks, promote_options="permissive") if chunks else pa.table({})


def _rows_table(rows: Sequence[tuple[int, Mapping[str, Any]]]) -> pa.Table:
    # `Table.from_pylist` takes the columns of the first row only.
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    columns = {}
    for name in names:
        try:
            columns[name] = pa.array([row.get(name) for _, row in rows])
        except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
            kinds: dict[str, int] = {}
            for number, row in rows:
                if row.get(name) is not None:
                    kinds.setdefault(type(row[name]).__name__, number)
            shown = ", ".join(f"{kind} (line {number} first)" for kind, number in kinds.items())
            raise ValueError(f"the values of {name!r} do not fit together, they are {shown}: {error}") from error
    return pa.table(columns)


def _read_csv(file: Path) -> pa.Table:
    return _text_table(_csv_rows(file), file)


def _csv_rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    # A quoted text may hold line ends, which stay as they are. Lone quotes and text beside quotes are errors.
    reader = csv.reader((line for _, line in read_lines(file, str(file), newline="")), strict=True)
    with _long_fields():
        while True:
            number = reader.line_num + 1
            try:
                row = next(reader, None)
            except csv.Error as error:
                raise UserError(
                    f"{file}, line {number}: {error}; a text with quotes stands in quotes, and its own are doubled: "
                    '"a ""red"" apple"'
                ) from error
            if row is None:
                return
            yield number, row


def _read_tsv(file: Path) -> pa.Table:
    return _text_table(_tsv_rows(file), file)


def _tsv_rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    for number, line in read_lines(file, str(file)):
        row = line.removesuffix("\n").split("\t")
        quoted = next((value for value in row if '""' in value and _QUOTED.fullmatch(value)), None)
        if quoted is not None:
            raise UserError(
                f"{file}, line {number}: {quoted[:80]!r} is quoted as in a CSV, but in a .tsv quotes are characters "
                "like others; write it without quoting, or as .csv"
            )
        yield number, [] if row == [""] else row


def _text_table(rows: Iterator[tuple[int, list[str]]], file: Path) -> pa.Table:
    """A header and rows of as many values each, as text: "NA", "001" or "2020-01-01" stay what they are.

    Blank lines are skipped.
    """
    header = next((row for _, row in rows if row), None)
    if header is None:
        raise UserError(f"{file} is empty: it has no header line")
    _check_names(header, str(file))

    def checked() -> Iterator[list[str]]:
        for number, row in rows:
            if row and len(row) != len(header):
                raise UserError(
                    f"{file}, line {number} has {len(row)} columns, the header has {len(header)} ({', '.join(header)})"
                )
            if row:
                yield row

    schema = pa.schema([(name, pa.large_string()) for name in header])
    values = checked()
    chunks = [
        pa.Table.from_arrays(
            [pa.array(column, pa.large_string()) for column in zip(*chunk, strict=True)], schema=schema
        )
        for chunk in iter(lambda: list(islice(values, _CHUNK)), [])
    ]
    return pa.concat_tables(chunks) if chunks else schema.empty_table()


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lets the csv module read texts of any length."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)
