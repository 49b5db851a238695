"""What `predict` and `evaluate` read and write, with an untrained student."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset
from tiny import tiny_bert_config, tiny_tokenizer

from amtss_fast.cli import main
from amtss_fast.models import AMTSSForSequenceClassification

LINE = '{"text": "a red apple", "language": "en"}\n'


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, without data."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    torch.manual_seed(1)
    names = ["neg", "neu", "pos"]
    student: Any = AMTSSForSequenceClassification.from_encoder(
        tiny_bert_config(), languages=["en", "sw"], id2label=names
    )
    for classifier in student.classifiers:
        torch.nn.init.normal_(classifier.weight, std=1.0)
    student.save_pretrained(folder / "student")
    tiny_tokenizer().save_pretrained(folder / "student")
    encoder = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {
        "output_dir": str(folder),
        "data": {"name": "nothing.jsonl", "max_length": 32},
        "student": {"encoder": encoder},
        "teachers": [{"name": "t", "model": {"encoder": encoder}}],
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def broken(run: Path, tmp_path: Path) -> Path:
    """The same with NaN in its weights."""
    shutil.copytree(run, tmp_path / "broken")
    student: Any = AMTSSForSequenceClassification.from_pretrained(run / "student")
    torch.nn.init.constant_(student.classifiers[0].bias, float("nan"))
    student.save_pretrained(tmp_path / "broken" / "student")
    return tmp_path / "broken"


def strict(text: str) -> list[Any]:
    def refuse(value: str) -> None:
        raise ValueError(value)

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("content", "options", "texts"),
    [
        (b"\xef\xbb\xbf" + LINE.encode() * 2, ["--jsonl"], ["a red apple"] * 2),
        (b"\n \n" + LINE.encode(), ["--jsonl"], ["a red apple"]),
        (b"\xef\xbb\xbfa\n\n\r\nb\r\nc", ["--language", "sw"], ["a", "b", "c"]),
        (b"a\rb\r", ["--language", "en"], ["a", "b"]),
        ('{"text": "a\\u2028b\x85\x7f", "language": "en"}'.encode(), ["--jsonl"], ["a\u2028b\x85\x7f"]),
        (b"", ["--language", "en"], []),
    ],
)
def test_read(
    run: Path, tmp_path: Path, content: bytes, options: list[str], texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.txt").write_bytes(content)
    assert main(["predict", str(run), str(tmp_path / "x.txt"), *options]) == 0
    assert [answer["text"] for answer in strict(capsys.readouterr().out)] == texts


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (LINE.encode() * 2 + b'{"text": oops}', ["--jsonl"], "x.txt, line 3 is not JSON"),
        (b'\n{"text": "a", "text": "b"}', ["--jsonl"], "x.txt, line 2 has the key 'text' twice"),
        (b'{"text": "\\ud800", "language": "en"}', ["--jsonl"], "x.txt, line 1 has half of a surrogate pair"),
        (b'{"text": 3, "language": "en"}', ["--jsonl"], 'x.txt, line 1: expected {"text": ...}'),
        (b"[1]", ["--jsonl"], "x.txt, line 1 is not a JSON object"),
        (b'{"text": "a", "language": 3}', ["--jsonl"], "x.txt, line 1: language must be a text, found 3"),
        (b'{"text": "a", "language": "xx"}', ["--jsonl"], "x.txt, line 1: the student has no language 'xx', it has en"),
        (LINE.encode() + b'{"text": "a"}', ["--jsonl"], "x.txt, line 2: no language"),
        (
            LINE.encode() + b"\n" + LINE.replace("}", ', "text_pair": "b"}').encode(),
            ["--jsonl"],
            "x.txt, line 1 and .*x.txt, line 3 differ",
        ),
        (b"a\nma\xf1ana\n", ["--language", "en"], r"x.txt, line 2 is not UTF-8 \(byte 0xf1"),
        ("a\n".encode("utf-16"), ["--language", "en"], "x.txt, line 1 (has a NUL byte|is not UTF-8)"),
        (b"a\0\n", ["--language", "en"], "x.txt, line 1 has a NUL byte"),
        (b"a\n", ["--language", "xx"], "--language xx: the student has the languages en, sw"),
    ],
)
def test_refused(
    run: Path, tmp_path: Path, content: bytes, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.txt").write_bytes(content)
    assert main(["predict", str(run), str(tmp_path / "x.txt"), *options]) == 2
    found = capsys.readouterr().err.splitlines()[-1]
    assert found.startswith("amtss-fast predict: ")
    assert re.search(message, found)


def test_standard_input(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfa\n\xe9\n"), encoding="utf-8"))
    assert main(["predict", str(run), "--language", "en"]) == 2
    assert "standard input, line 2 is not UTF-8" in capsys.readouterr().err


def test_other_encodings_of_the_output(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.txt").write_text("ma\u00f1ana", "utf-8")
    out = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(out, encoding="ascii"))
    assert main(["predict", str(run), str(tmp_path / "x.txt"), "--language", "en"]) == 0
    assert json.loads(out.getvalue())["text"] == "ma\u00f1ana"


def test_outputs_that_are_not_finite(broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.jsonl").write_text("\n" + LINE)
    assert main(["predict", str(broken), str(tmp_path / "x.jsonl"), "--jsonl"]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert f"{broken}: the student's output is not finite for the text of {tmp_path / 'x.jsonl'}, line 2" in err
    (tmp_path / "y.jsonl").write_text(LINE.replace("}", ', "label": "neg"}'))
    assert main(["evaluate", str(broken), f"data.name={tmp_path / 'y.jsonl'}", "--split", "train", "--json"]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert str(broken) in err.splitlines()[-1]
    assert "not finite" in err.splitlines()[-1]


def test_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(tmp_path / "nothing"), "--language", "en"]) == 2
    assert f"there is no run and no student in {tmp_path / 'nothing'}" in capsys.readouterr().err


def test_a_closed_pipe_ends_quietly(run: Path, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("a red apple\n" * 2000)
    command = [sys.executable, "-m", "amtss_fast.cli", "predict", str(run), str(tmp_path / "x.txt"), "--language", "en"]
    command += ["--batch-size", "1"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stderr is not None
    assert json.loads(child.stdout.readline())["text"] == "a red apple"
    child.stdout.close()
    err = child.stderr.read()
    assert child.wait() in (0, 141)
    assert "Traceback" not in err
    assert "Exception ignored" not in err


ROWS = [
    {"text": f"{word} {i}", "label": ("neg", "neu", "pos")[i % 3], "language": ("en", "sw")[i % 2]}
    for i, word in enumerate(["a red apple", "paka", "the rain", "mvua"] * 6)
]


class TestEvaluate:
    """Labels are aligned with the student's by name."""

    def right(self, run: Path, rows: list[dict[str, Any]]) -> float:
        student: Any = AMTSSForSequenceClassification.from_pretrained(run / "student")
        found = student.predict([row["text"] for row in rows], [row["language"] for row in rows])
        return sum(one.label == row["label"] for one, row in zip(found, rows, strict=True)) / len(rows)

    def accuracy(self, capsys: pytest.CaptureFixture[str], run: Path, file: Path, *options: str) -> float:
        assert main(["evaluate", str(run), f"data.name={file}", "--split", "train", "--json", *options]) == 0
        accuracy: float = strict(capsys.readouterr().out)[0]["accuracy"]
        return accuracy

    def write(self, path: Path, rows: list[dict[str, Any]]) -> Path:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    @pytest.mark.parametrize("kept", [("neg", "neu", "pos"), ("neu", "pos"), ("neg", "pos"), ("pos",)])
    def test_classes(
        self, run: Path, tmp_path: Path, kept: tuple[str, ...], capsys: pytest.CaptureFixture[str]
    ) -> None:
        rows = [row for row in ROWS if row["label"] in kept]
        want = pytest.approx(self.right(run, rows))
        file = self.write(tmp_path / "x.jsonl", rows)
        assert self.accuracy(capsys, run, file) == want
        assert self.accuracy(capsys, run, file, "data.label_names=[pos, neg, neu]") == want
        # Ids without names are the student's.
        ids = {"neg": "0.0", "neu": "1.0", "pos": "2.0"}
        numbered = self.write(tmp_path / "y.jsonl", [row | {"label": ids[row["label"]]} for row in rows])
        assert self.accuracy(capsys, run, numbered) == want
        own = Dataset.from_list(rows).cast_column("label", ClassLabel(names=sorted(kept, reverse=True)))
        own.to_parquet(tmp_path / "x.parquet")
        assert self.accuracy(capsys, run, tmp_path / "x.parquet") == want

    def test_names_that_the_student_lacks(self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = self.write(tmp_path / "x.jsonl", [*ROWS, ROWS[0] | {"label": "other"}])
        names = r"data.label_names=[neg, neu, pos, other]"
        for options in ([], [names]):
            assert main(["evaluate", str(run), f"data.name={file}", "--split", "train", *options]) == 2
            error = capsys.readouterr().err.splitlines()[-1]
            assert "'other'" in error
            assert "['neg', 'neu', 'pos']" in error

    def test_no_labels(self, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = self.write(tmp_path / "x.jsonl", [row | {"label": None} for row in ROWS])
        assert main(["evaluate", str(run), f"data.name={file}", "--split", "train"]) == 2
        assert "--split train: no row of it has a label" in capsys.readouterr().err
