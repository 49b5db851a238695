"""What a run would stumble over later is said before it starts, and nothing that exists is lost to it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import tiny_teacher
from tiny_tokens import tiny_model
from tiny_tokens import tokenizer as tokenizer_with_mask

from amtss_fast.cli import main
from amtss_fast.runs import load_config, preview
from amtss_fast.runs.folder import RunFolder

NAMES = ("neg", "pos")
TINY = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
TRAINING = {
    "max_steps": 2,
    "per_device_train_batch_size": 8,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
}


def rows(n: int, languages: tuple[str, ...] = ("en", "sw"), labels: tuple[Any, ...] = NAMES) -> list[dict[str, Any]]:
    return [
        {"text": f"text {i} is {labels[i % 2]}", "label": labels[i % 2], "language": languages[i // 2 % len(languages)]}
        for i in range(n)
    ]


def write(folder: Path, **splits: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, listed in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_teacher(tmp_path_factory.mktemp("models") / "t", labels=NAMES)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "all", train=rows(24), validation=rows(8), test=rows(8))


def settings(file: Path, folder: Path, teachers: list[dict[str, Any]], **more: Any) -> Path:
    values: dict[str, Any] = {
        "output_dir": str(file.parent / "run"),
        "data": {"name": str(folder), "max_length": 32},
        "tokenizer": {"vocab_size": 400},
        "student": {"encoder": TINY},
        "teachers": teachers,
        "training": TRAINING,
        "teacher_training": TRAINING,
    }
    for name, value in more.items():
        values[name] = values[name] | value if isinstance(values.get(name), dict) else value
    file.write_text(yaml.safe_dump(values))
    return file


FRESH = {"name": "fresh", "model": {"encoder": TINY}}
HIDDEN = (None, None)


@pytest.mark.parametrize(
    ("more", "splits", "message"),
    [
        ({"training": {"eval_strategy": "steps", "eval_steps": 1}}, {"train": rows(8)}, "has no validation split"),
        (
            {"teacher_training": {"eval_strategy": "epoch"}},
            {"train": rows(8), "validation": rows(8, labels=HIDDEN)},
            "teacher 'fresh': eval_strategy='epoch' .* has no label in the validation split",
        ),
        ({"training": {"eval_strategy": "epoch", "metric_for_best_model": "f1"}}, None, "'f1' is not computed.*accu"),
        ({}, {"train": rows(8), "dev": rows(8, ("en", "xh"))}, "the validation split has rows in xh.*it has en, sw"),
        (
            {"labels_only": True, "teachers": ["path"]},
            {"train": rows(8, labels=HIDDEN), "test": rows(8)},
            "no training row has a label",
        ),
        ({"teachers": [FRESH | {"languages": ["xh"]}]}, None, "teacher 'fresh' teaches xh"),
        ({"teachers": [FRESH | {"languages": ["sw"]}]}, {"train": rows(4, ("en",)) + rows(2, ("sw",), HIDDEN)},
         "teacher 'fresh' has nothing to learn from: no training row in sw has a label"),
        ({"training": {"dataloader_drop_last": True, "per_device_train_batch_size": 99}}, None, "student: dataloader_"),
        ({"teachers": [FRESH | {"training": {"dataloader_drop_last": True, "per_device_train_batch_size": 99}}]}, None,
         "teacher 'fresh': dataloader_drop_last=True leaves no batch: 24 training rows, and a batch takes 99"),
        ({"data": {"max_length": 33}}, None, "takes at most 32 tokens, and data.max_length is 33"),
        ({"training": {"importance_temperature": 0.2}, "teachers": ["path"]},
         {"train": rows(8, labels=HIDDEN), "test": rows(8)}, "learn from rows with a label"),
    ],
)  # fmt: skip
def test_said_before_the_start(
    tmp_path: Path,
    data: Path,
    teacher: Path,
    more: dict[str, Any],
    splits: dict[str, Any] | None,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    used = data if splits is None else write(tmp_path / "data", **splits)
    teachers = [{"name": "t", "path": str(teacher)} if t == "path" else t for t in more.get("teachers", [FRESH])]
    file = settings(tmp_path / "c.yaml", used, teachers, **{k: v for k, v in more.items() if k != "teachers"})
    for command in ("check", "train"):
        assert main([command, str(file)]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"amtss-fast {command}: ")
        assert re.search(message, error), error
    assert not (tmp_path / "run").exists()


def test_a_causal_model_must_not_see_its_targets(tmp_path: Path, data: Path) -> None:
    tokenizer = tokenizer_with_mask()
    for kind in ("bert", "llama"):
        tiny_model("causal-lm", kind).save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
    more = {"task": "causal-lm", "data": {"label": None}}
    for student, teacher, blamed in (("llama", "bert", "teacher 't'"), ("bert", "llama", "student")):
        file = settings(
            tmp_path / "c.yaml",
            data,
            [{"name": "t", "path": str(tmp_path / teacher)}],
            student={"encoder": str(tmp_path / student)},
            **more,
        )
        with pytest.raises(ValueError, match=rf"{blamed}: a BertLMHeadModel sees the tokens that it has to predict"):
            preview(load_config(file))
    both = [{"name": "t", "path": str(tmp_path / "llama")}]
    file = settings(tmp_path / "c.yaml", data, both, student={"encoder": str(tmp_path / "llama")}, **more)
    assert "per step" in preview(load_config(file))


def test_the_plan(tmp_path: Path, data: Path, teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = settings(tmp_path / "c.yaml", data, [{"name": "t", "path": str(teacher), "languages": ["sw"]}])
    assert main(["check", str(file)]) == 0
    out = capsys.readouterr().out
    assert [line.split() for line in out.splitlines()[:4]] == [
        ["rows", "train", "validation", "test"],
        ["en", "12", "4", "4"],
        ["sw", "12", "4", "4"],
        ["all", "24", "8", "8"],
    ]
    assert f"t        {teacher}  sw" in out
    assert "Note: no teacher teaches en: these rows learn from their labels alone" in out
    assert not (tmp_path / "run").exists()


def test_nothing_to_score_on(tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    used = write(tmp_path / "data", train=rows(16), test=rows(8, labels=HIDDEN))
    file = settings(tmp_path / "c.yaml", used, [{"name": "t", "path": str(teacher)}])
    assert main(["--trace", "train", str(file)]) == 0
    out = capsys.readouterr().out
    assert "Note: no test or validation split has labels: nothing will be scored" in out
    assert "Nothing was scored" in out
    assert (tmp_path / "run/student/model.safetensors").is_file()
    assert "Nothing was scored" in (tmp_path / "run/report.html").read_text()
    assert json.loads((tmp_path / "run/metrics.json").read_text())["test"] == {}


def test_a_run_is_replaced_when_its_replacement_is_complete(
    tmp_path: Path, data: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = settings(tmp_path / "c.yaml", data, [{"name": "t", "path": str(teacher)}])
    run = tmp_path / "run"
    assert main(["train", str(file)]) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    with monkeypatch.context() as broken:
        broken.setattr(RunFolder, "write_metrics", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
        with pytest.raises(OSError, match="disk is full"):
            main(["--trace", "train", str(file), "--overwrite", "seed=1"])
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    # The new run goes on where it stopped: its student is not trained again.
    capsys.readouterr()
    assert main(["train", str(file), "--resume", "seed=1"]) == 0
    assert "Training student" not in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir() if "run" in path.name] == ["run"]
    assert json.loads((run / "metrics.json").read_text())["config"]["output_dir"] == str(run)
    assert (run / "student/model.safetensors").read_bytes() != before[run / "student/model.safetensors"]
