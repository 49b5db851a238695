"""No reader joins, drops or alters a row: what is unclear is an error that names file and line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from amtss_fast.data import load_data
from amtss_fast.errors import UserError

CSV = b"text,label,language\n"
TSV = CSV.replace(b",", b"\t")
ROW = b'{"text": "a", "label": 0, "language": "en"}'


def texts(path: Path, content: bytes) -> list[str]:
    path.write_bytes(content)
    return list(load_data(path)["train"]["text"])


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("x.csv", CSV + b'"two\r\nlines, and a ""word""",x,en\nb,y,en', ['two\r\nlines, and a "word"', "b"]),
        ("x.csv", CSV + b'a "bare" quote,x,en\n"",y,en\n', ['a "bare" quote', ""]),
        ("x.csv", b"\xef\xbb\xbf" + CSV + b"a,x,en\n\n\nb,y,en\n", ["a", "b"]),
        ("x.csv", CSV.replace(b"\n", b"\r") + b"a,x,en\rb,y,en\r", ["a", "b"]),
        ("x.csv", CSV + b"a,x,en\r\nNA,y,en\r\n", ["a", "NA"]),
        ("x.csv", CSV + b'"' + b"x" * 200_000 + b'",x,en\n', ["x" * 200_000]),
        ("x.tsv", TSV + b'"a\tx\ten\n"b" c\ty\ten\nd"\tx\ten\n"e"\ty\ten\n', ['"a', '"b" c', 'd"', '"e"']),
        ("x.tsv", TSV.replace(b"\n", b"\r\n") + b"a\tx\ten\r\n\r\n \ty\ten\r\n", ["a", " "]),
        ("x.tsv", TSV + b"a\\tb, c\tx\ten", ["a\\tb, c"]),
        ("x.jsonl", b"\xef\xbb\xbf" + ROW + b"\n\n \n" + ROW.replace(b'"a"', b'"b"'), ["a", "b"]),
        ("x.jsonl", b"\r" + ROW + b"\r" + ROW + b"\r", ["a", "a"]),
        ("x.jsonl", ROW.replace(b'"a"', b'"\\ud83d\\ude00\\u0000\\u2028"'), ["\U0001f600\0\u2028"]),
        ("x.jsonl", ROW.replace(b'"a"', '"\x85\u2028\x0c"'.encode()).replace(b"\x0c", b"\\f"), ["\x85\u2028\x0c"]),
    ],
)
def test_right(tmp_path: Path, name: str, content: bytes, expected: list[str]) -> None:
    assert texts(tmp_path / name, content) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", CSV + b'"he said \\"hi\\"",x,en\n', "line 2: .*expected after"),
        ("x.csv", CSV + b'a,x,en\n"b,y,en\nc,x,en\n', "line 3: unexpected end of data"),
        ("x.csv", CSV + b'"a"b,x,en\n', "line 2: .*expected after"),
        ("x.csv", CSV + b"a,x,en\nb,y\n", r"line 3 has 2 columns, the header has 3 \(text, label, language\)"),
        ("x.csv", CSV + b"a,x,en,z\n", "line 2 has 4 columns"),
        ("x.csv", CSV + b'"a\n\nb",x,en\na\0,x,en\n', "line 5 has a NUL byte; is the file UTF-16"),
        ("x.csv", CSV + b"a,x,en\nma\xf1ana,y,en\n", r"line 3 is not UTF-8 \(byte 0xf1, character 3\)"),
        ("x.csv", CSV.decode().encode("utf-16"), "line 1 (has a NUL byte|is not UTF-8)"),
        ("x.csv", b"text,text\na,b\n", r"columns twice: \['text'\]"),
        ("x.tsv", TSV + b'a\tx\ten\n"he said ""hi"""\tx\ten\n', "line 3: .* is quoted as in a CSV"),
        ("x.tsv", TSV + b'"two\nlines"\tx\ten\n', "line 2 has 1 columns"),
        ("x.tsv", TSV + b'"a\tb"\tx\ten\n', "line 2 has 4 columns"),
        ("x.tsv", TSV + b"a\rb\tx\ten\n", "line 2 has 1 columns"),
        ("x.tsv", TSV + b"\xed\xa0\x80\tx\ten\n", "line 2 is not UTF-8"),
        ("x.jsonl", ROW + b'\n{"text": "a", "text": "b"}\n', "line 2 has the key 'text' twice"),
        ("x.jsonl", b'{"text": "a", "more": {"k": 1, "k": 2}}', "line 1 has the key 'k' twice"),
        ("x.jsonl", b"\n" + ROW.replace(b'"a"', b'"\\ud800"'), "line 2 has half of a surrogate pair"),
        ("x.jsonl", ROW.replace(b"0", b"Infinity"), "line 1 has Infinity, which is no JSON"),
        ("x.jsonl", ROW.replace(b"0", b"-Infinity"), "line 1 has -Infinity"),
        ("x.jsonl", b'{"text": ' + b"[" * 100_000, "line 1 is not JSON: .*recursion"),
        ("x.jsonl", ROW.replace(b"0", b"1" * 5000), "line 1 is not JSON: .*digits"),
        ("x.jsonl", ROW.replace(b"0", b"1" * 30), r"'label' do not fit together, they are int \(line 1 first\)"),
        ("x.jsonl", ROW + b"\n\n" + ROW.replace(b"0", b'"a"'), r"int \(line 1 first\), str \(line 3 first\)"),
        ("x.jsonl", ROW + b"\n" + ROW.replace(b"0", b"true"), r"int \(line 1 first\), bool \(line 2 first\)"),
        ("x.jsonl", ROW.replace(b'"a"', b'[["a"]]'), "either both hold lists|not of words"),
        ("x.jsonl", ROW.replace(b'"en"', b'["en"]'), "column 'language' holds list"),
        ("x.jsonl", ROW + b"\n" + ROW.replace(b"a", b"\xe9"), "line 2 is not UTF-8"),
        ("x.json", b"[\n" + ROW + b"\n]\n", "line 1 is not JSON"),
        ("x.parquet", b"PAR1" + bytes(20) + b"PAR1", "cannot be read as .parquet"),
        ("x.parquet", b"PAR1xxxx", "magic bytes"),
    ],
)
def test_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=rf"{name}.*{message}") as caught:
        texts(tmp_path / name, content)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.csv", b""),
        ("x.csv", b"\n\n"),
        ("x.csv", b"\xef\xbb\xbf"),
        ("x.csv", CSV),
        ("x.tsv", TSV + b"\n\r\n"),
        ("x.jsonl", b""),
        ("x.jsonl", b"\n \n"),
        ("x.parquet", b""),
    ],
)
def test_empty(tmp_path: Path, name: str, content: bytes) -> None:
    with pytest.raises(UserError, match=rf"{name} is empty"):
        texts(tmp_path / name, content)


def test_parquet_is_read_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "label=7"
    folder.mkdir()
    pq.write_table(pa.table({"text": ["a"], "language": ["en"]}), folder / "x.parquet")
    with pytest.raises(UserError, match="no column 'label'"):
        load_data(folder / "x.parquet")
    broken = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff"))
    pq.write_table(pa.table({"text": broken, "label": [0], "language": ["en"]}), tmp_path / "y.parquet")
    with pytest.raises(UserError, match=r"y\.parquet cannot be read .*UTF8"):
        load_data(tmp_path / "y.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "z.parquet")
    with pytest.raises(UserError, match=r"z\.parquet is empty"):
        load_data(tmp_path / "z.parquet")


def test_hidden_files_are_left_out(tmp_path: Path) -> None:
    for name in ("train.jsonl", ".train.jsonl", ".ipynb_checkpoints/train-checkpoint.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(ROW)
    assert len(load_data(tmp_path)["train"]) == 1


class TestSaved:
    """Folders that `save_to_disk` of datasets wrote."""

    @pytest.fixture
    def data(self) -> Dataset:
        names = ClassLabel(names=["neg", "pos"])
        features = Features({"text": Value("string"), "label": names, "language": Value("string")})
        datasets.disable_progress_bars()
        rows = {"text": ["a", "b", "c"], "label": [1, 0, -1], "language": ["en"] * 3}
        return Dataset.from_dict(rows, features=features)

    def shown(self, loaded: Any) -> dict[str, tuple[list[str], list[int]]]:
        return {split: (list(rows["text"]), list(rows["label"])) for split, rows in loaded.items()}

    def test_one(self, tmp_path: Path, data: Dataset) -> None:
        # The order of a selection is kept beside the rows.
        data.select([2, 0]).save_to_disk(tmp_path / "one")
        loaded = load_data(tmp_path / "one")
        assert self.shown(loaded) == {"train": (["c", "a"], [-1, 1])}
        assert loaded["train"].features["label"].names == ["neg", "pos"]
        assert list(load_data({"test": tmp_path / "one"})) == ["test"]

    def test_splits(self, tmp_path: Path, data: Dataset) -> None:
        DatasetDict({"odd": data.select([1]), "train": data}).save_to_disk(tmp_path / "many")
        found = self.shown(load_data(tmp_path / "many"))
        assert found == {"train": (["a", "b", "c"], [1, 0, -1]), "odd": (["b"], [0])}
        with pytest.raises(UserError, match="many has splits of its own, and cannot be 'test'"):
            load_data({"test": tmp_path / "many"})
        with pytest.raises(UserError, match="a split cannot be called 'one fold'; letters"):
            load_data({"one fold": tmp_path / "many" / "train"})
        (tmp_path / "many" / "odd" / "state.json").unlink()
        with pytest.raises(UserError, match=r"many is incomplete: its splits \['odd'\]"):
            load_data(tmp_path / "many")

    def test_folders_of_languages(self, tmp_path: Path, data: Dataset) -> None:
        for code in ("de", "en"):
            data.remove_columns("language").save_to_disk(tmp_path / code)
        assert list(load_data(tmp_path)["train"]["language"]) == ["de"] * 3 + ["en"] * 3

    def test_refused(self, tmp_path: Path, data: Dataset) -> None:
        data.save_to_disk(tmp_path / "one")
        with pytest.raises(UserError, match=r"unknown format '.arrow'.*the folder that save_to_disk wrote"):
            load_data(next((tmp_path / "one").glob("*.arrow")))
        (tmp_path / "one" / "state.json").write_text("{")
        with pytest.raises(UserError, match="one cannot be read as a saved data set"):
            load_data(tmp_path / "one")
        (tmp_path / "dataset_dict.json").write_text("[]")
        with pytest.raises(UserError, match=r"dataset_dict\.json cannot be read as the index of a saved data set"):
            load_data(tmp_path)
        data.save_to_disk(tmp_path / "set" / "one")
        (tmp_path / "set" / "more.jsonl").write_bytes(ROW)
        with pytest.raises(UserError, match="mixes the formats"):
            load_data(tmp_path / "set")
