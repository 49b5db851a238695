"""The command line from a configuration to predictions, on a run of a few steps."""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import pipeline

from amtss_fast.cli import main
from amtss_fast.teachers.int8 import why_missing

TINY = "{model_type: bert, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}"
SHORT = [
    "data.languages=[en, sw]",
    "tokenizer.vocab_size=600",
    f"student.encoder={TINY}",
    *(f"teachers.{k}.model.encoder={TINY}" for k in range(3)),
    "teachers.0.languages=[en]",
    "teachers.1.languages=[sw]",
    "teachers.2.languages=[en, sw]",
    *(f"{section}.{setting}" for section in ("training", "teacher_training") for setting in (
        "max_steps=6", "disable_tqdm=true", "use_cpu=true", "logging_steps=2", "learning_rate=1e-2",
    )),
    "training.eval_steps=2",
    "training.save_steps=2",
    "training.save_total_limit=3",
    "training.importance_temperature=0.1",
    "training.gap_temperature=0.5",
    "training.language_sampling=temperature",
    "training.language_sampling_exponent=0.3",
    "training.train_sampling_strategy=random",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "short"
    assert main(["--trace", "train", "demo", f"output_dir={folder}", *SHORT]) == 0
    return folder


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def test_run_folder(run: Path) -> None:
    metrics = read(run / "metrics.json")
    assert set(metrics["test"]) == {"student", "labels only", "teacher:west", "teacher:east", "teacher:south"}
    for result in metrics["test"].values():
        assert 0 < result["accuracy"] < 1
    counts = [result["count"] for result in metrics["test"]["student"]["per_language"].values()]
    assert sum(counts) == 1188
    assert list(metrics["test"]["teacher:west"]["per_language"]) == ["en"]
    assert metrics["test"]["student"] != metrics["test"]["labels only"]
    logs = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    weights = [log["teacher_weight"] for log in logs if "teacher_weight" in log]
    assert len(weights) == 3
    assert weights[0]["west"]["sw"] == 0
    assert 0 < weights[0]["south"]["sw"] < 1
    importance = [log["teacher_importance"] for log in logs if "teacher_importance" in log]
    assert len(importance) == 3
    assert importance[-1]["west"].keys() == {"en"}
    assert "Adaptive strategy" in (run / "report.html").read_text()
    assert "<svg" in (run / "report.html").read_text()
    assert not list(run.rglob("*.partial"))


@pytest.mark.parametrize("task", ["masked-lm", "causal-lm"])
def test_language_models(tmp_path: Path, task: str, capsys: pytest.CaptureFixture[str]) -> None:
    llama = TINY.replace("bert", "llama")
    models = [o.replace(TINY, llama) for o in SHORT if TINY in o] if task == "causal-lm" else []
    folder = tmp_path / "run"
    options = [o for o in SHORT if "importance_temperature" not in o and "gap_temperature" not in o]
    arguments = [f"output_dir={folder}", *options, f"task={task}", *models, "training.ce_weight=0.1"]
    assert main(["--trace", "train", "masked-lm", *arguments]) == 0
    logs = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [log["loss"] for log in logs if "loss" in log]
    assert len(losses) == 3
    assert losses[2] < losses[1] < losses[0]
    results = read(folder / "metrics.json")["test"]
    assert set(results) == {"student", "teacher:west", "teacher:east", "teacher:south"}
    assert list(results["teacher:west"]["per_language"]) == ["en"]
    # A uniform guess among 600 tokens is worth log 600 = 6.4 nats.
    assert all(result["loss"] < 6.3 for result in results.values())
    assert "per cent" in (folder / "report.html").read_text()
    assert main(["evaluate", str(folder)]) == 2
    assert f"is a run of task '{task}'" in capsys.readouterr().err
    assert main(["predict", str(folder), "--language", "en"]) == 2
    assert "predict is for classifiers" in capsys.readouterr().err


def test_token_classification(tmp_path: Path) -> None:
    """A word's label is its kind; half of the sentences of each language lose theirs."""
    words = {
        "en": {"article": ["the", "a"], "adjective": ["red", "old", "big"], "noun": ["fox", "house", "cat", "tree"]},
        "sw": {"noun": ["paka", "nyumba", "mti"], "adjective": ["mwekundu", "mzee", "mkubwa"]},
    }
    rng = random.Random(0)
    for split, n in (("train", 256), ("test", 40)):
        lines = []
        for i in range(n):
            code = ("en", "sw")[i % 2]
            labels = list(words[code])
            row = {"tokens": [rng.choice(words[code][label]) for label in labels], "tags": labels, "language": code}
            lines.append(json.dumps(row) + "\n")
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    folder = tmp_path / "run"
    data = [f"name={tmp_path}/*.jsonl", "text=tokens", "label=tags", "labelled_fraction=0.5"]
    longer = [f"{section}.max_steps=30" for section in ("training", "teacher_training")]
    off = ("importance_temperature", "gap_temperature", "max_steps", "data.")
    options = [o for o in SHORT if not any(name in o for name in off)]
    settings = [*options, *longer, *(f"data.{o}" for o in data), "labels_only=true", "data.languages=[en, sw]"]
    assert main(["--trace", "train", "masked-lm", "task=token-classification", f"output_dir={folder}", *settings]) == 0
    metrics = read(folder / "metrics.json")
    assert metrics["label_names"] == ["adjective", "article", "noun"]
    results = metrics["test"]
    assert set(results) == {"student", "labels only", "teacher:west", "teacher:east", "teacher:south"}
    # Words are counted, not their pieces.
    assert results["student"]["per_language"]["en"]["count"] == 60
    assert results["student"]["per_language"]["sw"]["count"] == 40
    assert results["student"]["accuracy"] > 0.95
    assert results["teacher:south"]["accuracy"] > 0.95
    student = pipeline("token-classification", str(folder / "student"))
    assert [found["entity"] for found in student("the red fox")] == ["article", "adjective", "noun"]


def test_settings_that_a_task_has_no_use_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "masked-lm", "student.pooling=cls"]) == 2
    assert "task 'masked-lm' has no use for pooling" in capsys.readouterr().err
    assert main(["train", "masked-lm", "teacher_cache.path=runs/cache"]) == 2
    assert "teacher_cache is for sequence-classification, not for task 'masked-lm'" in capsys.readouterr().err
    assert main(["train", "masked-lm", "task=summary"]) == 2
    expected = "Input should be 'sequence-classification', 'token-classification', 'masked-lm' or 'causal-lm'"
    assert expected in capsys.readouterr().err
    assert main(["train", "masked-lm", "data.labelled_fraction=0.5"]) == 2
    assert "data.labelled_fraction hides labels, task 'masked-lm' has none; got 0.5" in capsys.readouterr().err
    assert main(["train", "masked-lm", "task=token-classification", f"output_dir={tmp_path}"]) == 2
    assert "needs lists of words and of their labels, the data has one label per text" in capsys.readouterr().err


def test_a_run_is_not_overwritten_by_accident(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "demo", f"output_dir={run}", *SHORT]) == 2
    assert "holds a run" in capsys.readouterr().err
    assert main(["train", "demo", f"output_dir={run}", *SHORT, "seed=1", "--resume"]) == 2
    assert f"cannot resume {run}, settings have changed: seed: 0 there, 1 here\n" in capsys.readouterr().err
    (run.parent / "other").mkdir()
    (run.parent / "other" / "thesis.txt").write_text("mine")
    assert main(["train", "demo", f"output_dir={run.parent / 'other'}", *SHORT, "--overwrite"]) == 2
    assert "holds no run (it has thesis.txt)" in capsys.readouterr().err
    (run.parent / "other" / "config.yaml").write_text("mine: too")
    assert main(["train", "demo", f"output_dir={run.parent / 'other'}", *SHORT, "--overwrite"]) == 2
    assert (run.parent / "other" / "thesis.txt").exists()


def test_an_interrupted_run_resumes_to_the_same_student(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / run.name
    shutil.copytree(run, copy)
    for lost in ("student", "labels-only", "training/student/checkpoint-6"):
        shutil.rmtree(copy / lost)
    (copy / "metrics.json").unlink()
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace(str(run), str(copy)))
    assert main(["train", str(config), "--resume"]) == 0
    assert (copy / "student/model.safetensors").read_bytes() == (run / "student/model.safetensors").read_bytes()
    assert read(copy / "metrics.json")["test"] == read(run / "metrics.json")["test"]


def test_evaluate(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # Where the run was, for figures to the last bit.
    monkeypatch.setattr("amtss_fast.cli.evaluate.inference_device", lambda: "cpu")
    assert main(["evaluate", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == read(run / "metrics.json")["test"]["student"]
    assert main(["evaluate", str(run)]) == 0
    assert "sw" in capsys.readouterr().out
    assert main(["evaluate", str(run), "--split", "dev"]) == 2
    assert "--split dev: the data has train, validation, test" in capsys.readouterr().err


def test_predict(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a red apple\nthe rain\n"))
    assert main(["predict", str(run), "--language", "en"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["text"] for answer in answers] == ["a red apple", "the rain"]
    assert answers[0]["probabilities"][answers[0]["label"]] == answers[0]["score"]
    assert sum(answers[0]["probabilities"].values()) == pytest.approx(1, abs=1e-4)
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "mvua", "language": "sw"}\n{"text": "apple"}\n')
    assert main(["predict", str(run), str(file), "--jsonl", "--language", "en"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["language"] for answer in answers] == ["sw", "en"]
    assert main(["predict", str(run), str(file), "--jsonl"]) == 2
    assert "line 2: no language" in capsys.readouterr().err
    file.write_text('{"text": "mvua", "language": "sw"}\n{"text": \n')
    assert main(["predict", str(run), str(file), "--jsonl"]) == 2
    assert "line 2 is not JSON" in capsys.readouterr().err
    file.write_text('{"text": "mvua", "language": "xx"}\n')
    assert main(["predict", str(run), str(file), "--jsonl"]) == 2
    assert "'xx'" in capsys.readouterr().err


def test_report(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "report.html").read_bytes()
    assert main(["report", str(run)]) == 0
    assert "labels only" in capsys.readouterr().out
    assert (run / "report.html").read_bytes() == before


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "backend reference ready" in out
    assert "torch" in out


@pytest.mark.parametrize(
    "command", ["demo", "train", "cache", "teachers", "add-language", "evaluate", "predict", "report", "doctor"]
)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    assert exit.value.code == 0
    assert len(capsys.readouterr().out) > 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nothing"], "no configuration 'nothing': give a YAML file, or one of demo, masked-lm, xnli"),
        (["train", "demo", "student.pooling"], "an override must be key=value, got 'student.pooling'"),
        (["train", "demo", "teachers.7.name=a"], "'7' must be a place in a list of 3"),
        (["train", "demo", "seed.x=1"], "seed is 0, not a section"),
        (["train", "demo", "data.langages=[en]"], r"data.langages: unknown key, did you mean languages\?"),
        (["train", "demo", "data.labelled_fraction=0"], "data.labelled_fraction: Input should be greater than 0"),
        (["train", "demo", "teachers.0.name=a/b"], "teachers.0.name: String should match"),
        (["train", "demo", "training.temperature=-1"], "training.temperature: must be positive and finite, got -1"),
        (
            ["train", "demo", "training.learning_rat=1"],
            r"training.learning_rat: unknown key, did you mean learning_rate\?",
        ),
    ],
)
def test_wrong_configurations(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if arguments[1] == "demo":
        arguments = [*arguments, f"output_dir={tmp_path / 'run'}"]
    assert main(arguments) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_overrides_stand_before_and_after_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Any] = []
    monkeypatch.setattr("amtss_fast.runs.distil", lambda config, **options: calls.append((config, options)) or tmp_path)
    assert main(["train", "demo", "seed=1", "--resume", f"output_dir={tmp_path}", "title=new"]) == 0
    (config, options), *others = calls
    assert not others
    assert (config.seed, config.output_dir, config.title) == (1, str(tmp_path), "new")
    assert options == {"overwrite": False, "resume": True}


def test_the_package_needs_torch_and_numpy_only() -> None:
    script = """
import sys
before = set(sys.modules)
import torch
torch_needs = {name.partition(".")[0] for name in set(sys.modules) - before}
import amtss_fast
heavy = {"transformers", "datasets", "accelerate", "pyarrow", "matplotlib", "yaml", "pydantic", "jinja2"}
heavy |= {"triton"}
print(sorted(heavy & {name.partition(".")[0] for name in sys.modules} - torch_needs))
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "datasets" else real(name, package)
try:
    amtss_fast.AMTSSTrainer
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["[]", "amtss_fast.training needs datasets: pip install 'amtss-fast[train]'"]


def test_training_from_cached_logits(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teachers = []
    for name in ("east", "south"):
        shutil.copytree(run / "teachers" / name, tmp_path / name)
        teachers.append(f"{{name: {name}, path: {tmp_path / name}, languages: [sw]}}")
    adaptive = ("training.importance", "training.gap")
    settings = [
        setting
        for setting in SHORT
        if setting.startswith(("tokenizer", "student", "training")) and not setting.startswith(adaptive)
    ]
    arguments = [
        *settings,
        "data.languages=[sw]",
        "labels_only=false",
        f"teachers=[{', '.join(teachers)}]",
        f"output_dir={tmp_path / 'run'}",
        f"teacher_cache.path={tmp_path / 'cache'}",
    ]
    # In another process: what it computes is found again.
    command = [sys.executable, "-m", "amtss_fast.cli", "cache", "demo", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"(\w+): [\d,]+ rows of train in [\d.]+ MB \(float32\), 1 of 1 shards computed", done.stdout)
    assert found == ["east", "south"]
    assert not (tmp_path / "run").exists()
    assert main(["--trace", "train", "demo", *arguments]) == 0
    assert read(tmp_path / "run" / "metrics.json")["test"]["teacher:east"]["accuracy"] > 0
    # Another teacher under the same name is not the one that was cached.
    shutil.copytree(tmp_path / "south", tmp_path / "east", dirs_exist_ok=True)
    assert main(["train", "demo", *arguments, "--overwrite"]) == 2
    assert re.search(r"differs in .*weights \(cached: '\w+', now: '\w+'\)", capsys.readouterr().err)
    assert main(["cache", "demo", *arguments[:-1]]) == 2
    assert "the configuration has no teacher_cache: give teacher_cache.path, a folder" in capsys.readouterr().err


@pytest.mark.skipif(why_missing("onednn") is not None, reason=str(why_missing("onednn")))
def test_teachers_check(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [f"output_dir={run}", *SHORT]
    assert main(["--trace", "teachers", "check", "demo", *overrides, "--rows", "60", "--json"]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(r["teacher"], r["precision"]) for r in results] == [
        (name, precision) for precision in ("bfloat16", "int8") for name in ("west", "east", "south")
    ]
    assert [list(r["languages"]) for r in results[3:]] == [["en"], ["sw"], ["en", "sw"]]
    for result in results:
        assert all(v["rows"] == 30 and v["kl"] > 0 and v["margin_change"] > 0 for v in result["languages"].values())
        assert result["speedup"] > 0
        assert 0.2 < result["memory_share"] < 0.7
    # One teacher alone has the weight 1, whatever its bits.
    assert results[0]["languages"]["en"]["weight_change"] > 0
    assert main(["teachers", "check", "demo", *overrides, "--precisions", "int4"]) == 2
    assert "precisions must be among bfloat16, int8; got int4" in capsys.readouterr().err
    assert main(["teachers", "check", "demo", *SHORT, f"output_dir={run / 'none'}"]) == 2
    assert "teacher 'west' is not trained yet" in capsys.readouterr().err
