"""Data files that expand: the error comes before the memory is gone."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from amtss_fast.data import files, load_data
from amtss_fast.errors import UserError


def test_parquet_that_expands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few bytes for a text of a megabyte that stands in each of 20,000 rows."""
    file = tmp_path / "x.parquet"
    one = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), pa.array(["x" * 1_000_000]))
    pq.write_table(pa.table({"text": one}), file, compression="zstd", store_schema=False)
    assert file.stat().st_size < 10_000
    monkeypatch.setattr(files, "_BATCH", 10)
    monkeypatch.setattr(files, "available", lambda device: 50_000_000)
    with pytest.raises(UserError, match=r"x\.parquet does not fit into memory: 20,000 rows of 1 columns"):
        load_data(file)


def test_parquet_of_many_rows(tmp_path: Path) -> None:
    """The rows that a file declares are compared with the memory before any is read."""
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"label": pa.array([0] * 10_000_000, pa.int8())}), file, compression="zstd")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(files, "available", lambda device: 1_000_000)
        patched.setattr(pq.ParquetFile, "iter_batches", None)
        with pytest.raises(UserError, match=r"x\.parquet does not fit into memory: 10,000,000 rows"):
            load_data(file)


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.csv.gz", "x.zip", "x.pkl", "x.pt"])
def test_packed_and_pickled_files_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x1f\x8b")
    with pytest.raises(UserError, match="unknown format"):
        load_data(tmp_path / name)


def test_batches_are_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_BATCH", 3)
    rows = {"text": list("abcdefgh"), "label": list(range(8)), "language": ["en"] * 8}
    pq.write_table(pa.table(rows), tmp_path / "x.parquet", row_group_size=5)
    assert list(load_data(tmp_path / "x.parquet")["train"]["text"]) == rows["text"]
