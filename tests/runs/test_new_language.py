"""A language is added to a finished run: what it learns, and that the others keep their bits."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_teacher

from amtss_fast.cli import main
from amtss_fast.data import load_data
from amtss_fast.models import AMTSSForSequenceClassification, load_tokenizer
from amtss_fast.runs import distil
from amtss_fast.runs.config import RunConfig, load_config

ENCODER = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXTS = ["a red apple on the table", "the rain", "mvua na upepo", "paka mwekundu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    names = load_data("cldr_topic", languages=["en"], splits=["test"])["test"].features["label"].names
    values = load_config("demo").model_dump()
    values |= {
        "output_dir": str(folder / "base"),
        "labels_only": False,
        "tokenizer": {"path": str(tiny_teacher(folder / "teacher", labels=names))},
        "student": {"encoder": {**ENCODER, "intermediate_size": 32}},
        "teachers": [{"name": "t", "path": str(folder / "teacher"), "languages": ["en", "sw"]}],
    }
    values["data"] |= {"languages": ["en", "sw"]}
    values["training"] = {
        "max_steps": 12,
        "learning_rate": 1e-2,
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 4,
        "save_strategy": "no",
        "ce_weight": 0.5,
    }
    return distil(RunConfig.model_validate(values))


def logits(folder: Path, languages: list[str]) -> torch.Tensor:
    """[4, C] of the student of a run."""
    student = AMTSSForSequenceClassification.from_pretrained(folder / "student").eval()
    inputs = load_tokenizer(folder / "student")(TEXTS, padding=True, return_tensors="pt")
    ids = torch.tensor([student.config.language_id(code) for code in languages])
    with torch.inference_mode():
        return student(**inputs, language_ids=ids).logits


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text("utf-8"))


def accuracy(folder: Path, system: str, code: str) -> float:
    return metrics(folder)["test"][system]["per_language"][code]["accuracy"]


def test_the_other_languages_keep_their_bits(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # All figures from where the run was.
    monkeypatch.setattr("amtss_fast.cli.evaluate.inference_device", lambda: "cpu")
    old = logits(run, ["en", "en", "sw", "sw"])
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    # Nobody teaches French: labels alone.
    command = ["--trace", "add-language", str(run), "fr", "training.max_steps=60", "--rows", "200"]
    command.append("training.teacher_temperature=[3]")
    assert main(command) == 0
    assert "before fr" in capsys.readouterr().out
    new = run.with_name("base-fr")
    assert torch.equal(logits(new, ["en", "en", "sw", "sw"]), old)
    assert before == {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    assert metrics(new)["languages"] == ["en", "sw", "fr"]
    for code in ("en", "sw"):
        assert accuracy(new, "student", code) == accuracy(new, "before fr", code)
    assert (
        metrics(new)["test"]["student"]["per_language"]["fr"]["loss"]
        < 0.98 * (metrics(new)["test"]["before fr"]["per_language"]["fr"]["loss"])
    )
    # The new folder is a run like any other.
    assert main(["evaluate", str(new), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["per_language"]["fr"]["accuracy"] == accuracy(new, "student", "fr")
    assert "<svg" in (new / "report.html").read_text("utf-8")
    assert main(["add-language", str(run), "fr"]) == 2
    assert "base-fr is not empty" in capsys.readouterr().err
    assert main(["add-language", str(new), "fr", "output_dir=x"]) == 2
    assert "fr twice" in capsys.readouterr().err


def test_unlabeled_texts_are_distilled(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temperatures = []
    monkeypatch.setattr(
        "amtss_fast.runs.new_language.try_training",
        lambda *given: temperatures.append(given[3].teacher_temperature),
    )
    rows = load_data("cldr_topic", languages=["sw"])["train"].select(range(300))
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in rows["text"]), "utf-8")
    path = run.parent / "teacher"
    others = f"{{name: other, path: {path}, languages: [en]}}, {{name: t, path: {path}, prior: 2.0, languages: [xx]}}"
    teacher = ["training.teacher_temperature=[5, 3]", f"teachers=[{others}]"]
    target = f"output_dir={tmp_path / 'new'}"
    texts = [f"data={file}", "data.label=null", "data.language_default=xx", "training.max_steps=60"]
    texts.append("training.learning_rate=1e-2")
    command = ["--trace", "add-language", str(run), "xx", "--like", "mean", target, *texts, *teacher]
    assert main(command) == 0
    # Only the second one teaches the language.
    assert temperatures == [[3.0]]
    lines = [json.loads(line) for line in (tmp_path / "new" / "log.jsonl").read_text().splitlines()]
    kd = [line["kd"] for line in lines if "kd" in line]
    assert sum(kd[-5:]) < 0.8 * sum(kd[:5])
    # There is nothing to test the new language on.
    assert set(metrics(tmp_path / "new")["test"]["student"]["per_language"]) == {"en", "sw"}
    assert metrics(tmp_path / "new")["started_like"] == "mean"
    assert torch.equal(logits(tmp_path / "new", ["en"] * 4), logits(run, ["en"] * 4))
    with pytest.raises(ValueError, match="nothing to learn from: no row has a label, and no teacher teaches xx"):
        main([*command[:-2], "--overwrite"])


def test_replay_trains_the_whole_student(run: Path, tmp_path: Path) -> None:
    rows = load_data("cldr_topic", languages=["fr"])["train"].select(range(100))
    names = rows.features["label"].names
    file = tmp_path / "fr.csv"
    with file.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([["text", "label"], *([r["text"], names[r["label"]]] for r in rows)])
    settings = [f"data={file}", f"output_dir={tmp_path / 'new'}", "training.max_steps=4"]
    assert main(["--trace", "add-language", str(run), "fr", *settings, "--replay", "--own-classifier"]) == 0
    # A fifth of the rows is kept back to test on.
    assert metrics(tmp_path / "new")["test"]["student"]["per_language"]["fr"]["count"] == 20
    assert not torch.equal(logits(tmp_path / "new", ["en"] * 4), logits(run, ["en"] * 4))


def test_classifiers_of_their_own(run: Path) -> None:
    student = AMTSSForSequenceClassification.from_pretrained(run / "student").eval()
    inputs = load_tokenizer(run / "student")(TEXTS, padding=True, return_tensors="pt")
    ids = torch.tensor([0, 1, 0, 1])
    with torch.inference_mode():
        shared = student(**inputs, language_ids=ids).logits
        student.split_classifier()
        assert torch.equal(student(**inputs, language_ids=ids).logits, shared)
    student.classifiers[0].weight.data.zero_()
    assert student.classifiers[1].weight.any()
    with pytest.raises(ValueError, match="'per_language' already"):
        student.split_classifier()


def test_starts_from_the_language_of_the_largest_margin(run: Path, tmp_path: Path) -> None:
    rows = load_data("cldr_topic", languages=["fr"])["train"]
    student = AMTSSForSequenceClassification.from_pretrained(run / "student")
    tokenizer = load_tokenizer(run / "student")
    margins = {}
    for code in ("en", "sw"):
        found = student.predict(rows["text"], code, tokenizer=tokenizer)
        margins[code] = 0.0
        for row, label in zip(found, rows["label"], strict=True):
            # At temperature 2, as the loss has it.
            p = torch.tensor(list(row.probabilities.values())).log().div(2).softmax(0)
            margins[code] += float(p[label] - p[torch.arange(len(p)) != label].max())
    folder = tmp_path / "new"
    rows_of_all = ["training.max_steps=1", "data.labelled_fraction=1.0", f"output_dir={folder}"]
    assert main(["--trace", "add-language", str(run), "fr", *rows_of_all]) == 0
    assert metrics(folder)["started_like"] == max(margins, key=lambda code: margins[code])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sw"], "sw twice"),
        (["fr", "--like", "de"], "language 'de' is unknown; allowed: en, sw"),
        (["fr", "--rows", "0"], "rows must be at least 1, got 0"),
        (["fr", "data=nothing.csv"], "nothing.csv"),
        (["fr", "data.txt=a"], "data.txt: unknown key, did you mean text?"),
        (["fr", "data=cldr_pairs"], "differ from the set's own label names ['entailment', 'neutral', 'contradiction']"),
    ],
)
def test_wrong_arguments(run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    target = run.with_name("nothing")
    assert main(["add-language", str(run), *arguments, f"output_dir={target}"]) == 2
    assert message in capsys.readouterr().err
    assert not target.exists()


def test_there_must_be_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["add-language", str(tmp_path), "sw"]) == 2
    assert "holds no finished run" in capsys.readouterr().err
