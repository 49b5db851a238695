"""Readers under arbitrary content: the same rows come back, or a UserError names the file.

`--hypothesis-profile=NAME` runs more examples.
"""

from __future__ import annotations

import csv
import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzz import outcome
from hypothesis import given
from hypothesis import strategies as st

from amtss_fast.data import load_data
from amtss_fast.data.files import read_file
from amtss_fast.errors import UserError

SUFFIXES = [".csv", ".tsv", ".jsonl", ".parquet"]
CHARACTERS = st.characters(exclude_categories=["Cs"])
TEXTS = st.text(CHARACTERS, max_size=12) | st.text('a"\\,\t\n\r\0 \ufeff\u2028\x85\x1c', max_size=6)
ROWS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5)
PIECES = [b'"', b"\\", b",", b"\t", b"\n", b"\r", b"\0", b"text", b"label", b"en", b"{", b"}", b"[", b":", b"1", b"-1"]
PIECES += [b"\xef\xbb\xbf", b"\xff\xfe", b"\xe9", b'{"text": "a"}', b'"\\ud800"', b"NaN", b"1e999", b"PAR1", b"null"]


def write(path: Path, rows: list[dict[str, str]]) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8", newline="")
    elif path.suffix == ".tsv":
        lines = ["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n", "utf-8", newline="")
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def may_refuse(suffix: str, values: list[str]) -> bool:
    """Whether the format cannot hold the values."""
    if suffix == ".csv":
        return any("\0" in value for value in values)
    # A line end or tab ends a value; a text may look as if a CSV had quoted it.
    return suffix == ".tsv" and any(set(value) & set("\0\t\r\n") or '""' in value for value in values)


def message_of(path: Path, **options: Any) -> str:
    """What the error says; the path where the file can be read."""
    try:
        load_data(path, **options)
    except UserError as error:
        outcome(f"load_data {path.suffix}", type(error).__name__)
        return str(error)
    outcome(f"load_data {path.suffix}")
    return str(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(rows=ROWS)
def test_rows_come_back(suffix: str, rows: list[tuple[str, str]]) -> None:
    table = [{"id": f"{i}", "text": text, "label": label} for i, (text, label) in enumerate(rows)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"x{suffix}"
        write(path, table)
        try:
            found = read_file(path).to_pylist()
        except UserError as error:
            found = str(error)
        if suffix == ".tsv":
            # A carriage return at the end of a line belongs to the line's end.
            table = [row | {"label": row["label"].removesuffix("\r")} for row in table]
        if isinstance(found, str):
            assert str(path) in found
            assert may_refuse(suffix, [value for row in rows for value in row])
        else:
            assert found == table


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(
    labels=st.lists(
        st.sampled_from(
            ["0", "1", "0.0", "1.0", "-1", "-1.0", "", "nan", "None", "a", "A", "caf\u00e9", "cafe\u0301", " a"]
        )
        | st.text(CHARACTERS.filter(lambda c: c.isprintable()), max_size=3),
        min_size=1,
        max_size=6,
    ),
    names=st.none() | st.lists(st.sampled_from(["0", "1", "a", "caf\u00e9", "-1", "nan"]), min_size=1, unique=True),
)
def test_labels_mean_the_same_in_every_format(suffix: str, labels: list[str], names: list[str] | None) -> None:
    def load(suffix: str) -> Any:
        path = Path(folder) / f"x{suffix}"
        write(path, [{"text": "a", "label": label, "language": "en"} for label in labels])
        try:
            train = load_data(path, label_names=names)["train"]
        except UserError as error:
            return str(error).replace(str(path), "")
        return train.features["label"].names, list(train["label"])

    with tempfile.TemporaryDirectory() as folder:
        found = load(suffix)
        if not any('""' in label for label in labels):
            assert found == load(".jsonl")
    if names is not None and not isinstance(found, str):
        assert found[0] == names


@pytest.mark.parametrize("suffix", SUFFIXES)
@given(content=st.binary(max_size=80) | st.lists(st.sampled_from(PIECES), max_size=20).map(b"".join))
def test_bytes_give_rows_or_a_user_error(suffix: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"x{suffix}"
        path.write_bytes(content)
        for options in ({}, {"language": None, "language_default": "en"}):
            assert str(path) in message_of(path, **options)


@given(place=st.integers(0, 2000), byte=st.integers(0, 255))
def test_a_parquet_file_with_a_wrong_byte(place: int, byte: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.parquet"
        write(path, [{"text": "a", "label": "x", "language": "en"}] * 3)
        content = bytearray(path.read_bytes())
        content[place % len(content)] = byte
        path.write_bytes(content)
        assert str(path) in message_of(path)
