"""Wrong files, columns, splits and arguments end in an error that shows what was found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tables import ROWS, write

from amtss_fast.data import load_data
from amtss_fast.errors import UserError


class TestErrors:
    @pytest.mark.parametrize("argument", ["text", "text_pair", "label", "keep"])
    def test_missing_column(self, tmp_path: Path, argument: str) -> None:
        options: dict[str, Any] = {argument: ["nope"] if argument == "keep" else "nope"}
        if argument == "text_pair":
            options["text"] = "text"
        with pytest.raises(UserError, match=rf"no column 'nope' \(argument {argument}\).*'language'\]"):
            load_data(write(tmp_path / "t.csv", ROWS), **options)

    def test_files(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no file or folder.*cldr_pairs"):
            load_data(tmp_path / "nope.csv")
        with pytest.raises(FileNotFoundError, match=r"no file or folder 'nope\.csv'"):
            load_data("nope.csv")
        (tmp_path / "notes.txt").write_text("x")
        with pytest.raises(UserError, match=r"unknown format '.txt'; known are \['.csv'"):
            load_data(tmp_path / "notes.txt")
        with pytest.raises(FileNotFoundError, match=r"no file in a known format.*notes.txt"):
            load_data(tmp_path)
        write(tmp_path / "train.csv", ROWS)
        write(tmp_path / "train.jsonl", ROWS)
        with pytest.raises(UserError, match=r"mixes the formats \['.csv', '.jsonl'\]"):
            load_data(tmp_path)

    def test_splits(self, tmp_path: Path) -> None:
        path = write(tmp_path / "train.csv", ROWS)
        with pytest.raises(UserError, match=r"no split \['test'\]; it has \['train'\]"):
            load_data(path, splits=["test"])
        write(tmp_path / "more.csv", ROWS)
        with pytest.raises(UserError, match=r"more.csv names no split, but .*train.csv.*mapping"):
            load_data(tmp_path)
        write(tmp_path / "more.csv", ROWS).rename(tmp_path / "train_test.csv")
        with pytest.raises(UserError, match=r"several splits: \['test', 'train'\]"):
            load_data(tmp_path)

    def test_empty_split(self, tmp_path: Path) -> None:
        write(tmp_path / "train.csv", ROWS)
        write(tmp_path / "test.csv", ROWS[:2])
        with pytest.raises(UserError, match=r"split 'test' is empty; .*'train': {'sw': 2}"):
            load_data(tmp_path, languages=["sw"])
        (tmp_path / "test.csv").write_text("text,label,language\n")
        with pytest.raises(UserError, match=r"test\.csv is empty: it has no rows"):
            load_data(tmp_path)
        (tmp_path / "test.csv").write_text("")
        with pytest.raises(UserError, match=r"test\.csv is empty"):
            load_data(tmp_path)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b'{"text": "a"\n', r"x.jsonl, line 1 is not JSON"),
            (b'{"text": "a"}\n[1]\n', r"x.jsonl, line 2 is not a JSON object.*\[1\]"),
            (b"\xff\xfe\n", r"x.jsonl, line 1 is not UTF-8 \(byte 0xff, character 1\)"),
            (b'{"label": 1}\n{"label": "a"}\n', r"x.jsonl cannot be read"),
        ],
    )
    def test_broken_json(self, tmp_path: Path, content: bytes, message: str) -> None:
        (tmp_path / "x.jsonl").write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_data(tmp_path / "x.jsonl")

    @pytest.mark.parametrize(
        ("suffix", "message"),
        [
            ("csv", r"x.csv, line 2 has 3 columns, the header has 2 \(text, label\)"),
            ("parquet", r"x.parquet cannot be read as .parquet"),
        ],
    )
    def test_broken_tables(self, tmp_path: Path, suffix: str, message: str) -> None:
        path = tmp_path / f"x.{suffix}"
        path.write_bytes(b"text,label\n1,2,3\n")
        with pytest.raises(UserError, match=message):
            load_data(path)

    def test_columns(self, tmp_path: Path) -> None:
        path = tmp_path / "x.csv"
        path.write_text("text,text\na,b\n")
        with pytest.raises(UserError, match=r"columns twice: \['text'\]"):
            load_data(path)
        path = write(tmp_path / "x.jsonl", [{"text": 3, "label": 0, "language": "en"}])
        with pytest.raises(UserError, match="column 'text' holds int64, not text"):
            load_data(path)
        write(path, [*ROWS, {"text": None, "label": "good", "language": "en"}])
        with pytest.raises(UserError, match="column 'text' has 1 empty values, the first in row 4"):
            load_data(path)
        path = write(tmp_path / "y.csv", [{"text": "a", "label": 0, "language": None}])
        with pytest.raises(UserError, match="column 'language' has 1 empty values"):
            load_data(path)

    def test_arguments(self, tmp_path: Path) -> None:
        path = write(tmp_path / "t.csv", ROWS)
        with pytest.raises(TypeError, match="languages and keep are sequences"):
            load_data(path, languages="en")
        with pytest.raises(TypeError, match="splits is a sequence or a mapping"):
            load_data(path, splits="train")
        with pytest.raises(TypeError, match=r"takes no Hub arguments: .*'revision': 'main'"):
            load_data(path, revision="main")
        with pytest.raises(TypeError, match=r"'cldr_topic' .*takes no Hub arguments: .*'config': 'en'"):
            load_data("cldr_topic", config="en")
        with pytest.raises(UserError, match="text_pair='b' needs text"):
            load_data(path, text_pair="b")
