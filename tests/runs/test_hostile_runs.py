"""Crafted run folders: nothing in them runs, expands, or writes elsewhere."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_bert_config

from amtss_fast.errors import UserError
from amtss_fast.models import AMTSSForSequenceClassification
from amtss_fast.runs.folder import RunFolder
from amtss_fast.runs.memory_plan import MemoryPlan
from amtss_fast.runs.report import read_run, write_report
from amtss_fast.training import AMTSSTrainer, AMTSSTrainingArguments

LEAST = {"languages": ["en"], "test": {"student": {"per_language": {"en": {"accuracy": 1.0, "count": 3}}}}}


def make_run(path: Path, metrics: str | dict[str, Any] = LEAST, log: str = "", config: str = "") -> Path:
    path.mkdir(exist_ok=True)
    (path / "metrics.json").write_text(metrics if isinstance(metrics, str) else json.dumps(metrics))
    if log:
        (path / "log.jsonl").write_text(log)
    if config:
        (path / "config.yaml").write_text(config)
    return path


def nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ("[" * 100_000, "is not JSON: .*recursion"),
        ("1" * 5000, "is not JSON: .*digits"),
        ('{"task": "\\ud800", ' + json.dumps(LEAST)[1:], "is not JSON: .*surrogates"),
        ('{"config": ' + nested(900) + ", " + json.dumps(LEAST)[1:], "nested too deep|recursion"),
        ({**LEAST, "seconds": {"total": float("inf")}}, "'seconds' of 'total' is a number, not inf"),
        ({**LEAST, "seconds": {"total": float("nan")}}, "'seconds' of 'total' is a number, not nan"),
        ({**LEAST, "sizes": {"student": 10**400}}, "'sizes' of 'student' is a number"),
        ({**LEAST, "teacher_languages": {"a": 3}}, "'teacher_languages' of 'a' is a list of strings, not 3"),
        ({**LEAST, "label_names": 3}, "'label_names' is a list, not 3"),
        (json.dumps(LEAST).replace("1.0", "NaN"), r"is in \[0, 1\], not nan"),
        (json.dumps(LEAST).replace('"count": 3', '"count": "x"'), "count of 'student' in 'en' is a number of texts"),
        (json.dumps(LEAST).replace('"count": 3', '"count": -3'), "count of 'student' in 'en' is a number of texts"),
    ],
)
def test_metrics(tmp_path: Path, metrics: str | dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"metrics\.json.*({message})"):
        write_report(make_run(tmp_path, metrics))
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    "line", ['{"step": ' + nested(100_000), '{"step": 1e999}', '{"step": ' + "1" * 400 + "}", "[]"]
)
def test_log(tmp_path: Path, line: str) -> None:
    with pytest.raises(UserError, match=r"log\.jsonl, line 2"):
        write_report(make_run(tmp_path, log=f'{{"step": 1}}\n{line}\n'))


PLAN: dict[str, Any] = {
    "precision": "int8", "resident": None, "approximate": True, "micro_batch": 8, "accumulation": 4,
    "checkpointing": False, "chunk_rows": None, "budget": 10**9, "expected": 9 * 10**8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("", "EOF"),
        ("[" * 100_000, "recursion"),
        ("\udc80", "JSON"),
        ("[]", "object"),
        ({**PLAN, "micro_batch": 0}, "micro_batch: .* greater than 0, got 0"),
        ({**PLAN, "micro_batch": "8"}, "micro_batch: .* integer, got '8'"),
        ({**PLAN, "accumulation": 1e999}, "accumulation: .* integer"),
        ({name: value for name, value in PLAN.items() if name != "budget"}, "budget: is missing"),
    ],
)
def test_plan(tmp_path: Path, plan: str | dict[str, Any], message: str) -> None:
    text = plan if isinstance(plan, str) else json.dumps(plan)
    (tmp_path / "memory.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=rf"memory\.json holds no plan .*{message}"):
        RunFolder(tmp_path).read_plan()


def test_a_plan_comes_back(tmp_path: Path) -> None:
    folder, plan = RunFolder(tmp_path), MemoryPlan(**PLAN)
    folder.write_plan(plan)
    assert folder.read_plan() == plan


def test_yaml_that_multiplies(tmp_path: Path) -> None:
    """Aliases and merge keys of a configuration are not followed: 9 ** 12 entries."""
    lines = ["a0: &a0 {x: 1}"] + [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 13)]
    assert read_run(make_run(tmp_path, config="\n".join(lines))).config
    with pytest.raises(UserError, match=r"config\.yaml is not YAML: .*recursion"):
        read_run(make_run(tmp_path, config="[" * 5000))


def test_tags_of_yaml_make_nothing(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    write_report(make_run(tmp_path / "run", config=f"a: !!python/object/apply:os.mkdir [{victim}]"))
    assert not victim.exists()


def test_sizes_and_kinds_of_files(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with (run / "log.jsonl").open("wb") as file:
        file.truncate(100 << 30)
    with pytest.raises(UserError, match=r"log\.jsonl has 107,374,182,400 bytes"):
        write_report(run)
    (run / "log.jsonl").unlink()
    (run / "log.jsonl").symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"log\.jsonl is no file"):
        write_report(run)
    (run / "metrics.json").unlink()
    os.mkfifo(run / "metrics.json")
    with pytest.raises(FileNotFoundError, match=r"metrics\.json is missing"):
        write_report(run)


def test_the_page_is_not_written_through_links(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    run = make_run(tmp_path / "run")
    for name in ("report.html", "report.html.partial"):
        (run / name).symlink_to(victim)
    write_report(run)
    assert victim.read_text() == "mine"
    assert not (run / "report.html").is_symlink()


def test_names_are_texts_in_the_page(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>\"'><svg onload=x>"
    metrics = {"languages": [evil], "test": {"student": {"per_language": {evil: {"accuracy": 1.0}}}}}
    metrics |= {"task": evil, "created": evil, "machine": evil, "split": evil, "label_names": [evil]}
    metrics |= {"versions": {evil: evil}, "seconds": {evil: 1.0}, "config": {evil: evil}}
    page = write_report(make_run(tmp_path, metrics, json.dumps({"step": 1, evil: 1.0, "loss": 1.0}))).read_text()
    assert "<script" not in page
    assert "<svg onload" not in page
    assert "Content-Security-Policy\" content=\"default-src 'none'" in page


class Bomb:
    """Makes a folder where it is unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.victim),)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    trainer(folder, 1).train()
    return folder / "checkpoint-1"


def trainer(folder: Path, steps: int) -> AMTSSTrainer:
    config = tiny_bert_config()
    model = AMTSSForSequenceClassification.from_encoder(config, languages=["en"], num_labels=2)
    rows = [{"input_ids": torch.tensor([1, 2]), "language_ids": 0, "labels": 1}] * 4
    arguments = AMTSSTrainingArguments(
        str(folder),
        max_steps=steps,
        save_steps=1,
        per_device_train_batch_size=2,
        kd_weight=0.0,
        ce_weight=1.0,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    return AMTSSTrainer(model, arguments, train_dataset=rows)


def test_a_checkpoint_is_resumed(checkpoint: Path, tmp_path: Path) -> None:
    going_on = trainer(tmp_path, 2)
    going_on.train(resume_from_checkpoint=str(checkpoint))
    assert going_on.state.global_step == 2


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize(
    "name",
    ["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "training_args.bin", "pytorch_model.bin", "model"],
)
def test_no_file_of_a_checkpoint_is_unpickled(checkpoint: Path, tmp_path: Path, name: str, form: str) -> None:
    crafted, victim = tmp_path / "checkpoint-1", tmp_path / "victim"
    crafted.mkdir()
    for file in checkpoint.iterdir():
        (crafted / file.name).write_bytes(file.read_bytes())
    if name == "model":
        # Without safetensors the stock loop looks for a pickle.
        name = "pytorch_model.bin"
        (crafted / "model.safetensors").unlink()
    if form == "pickle":
        (crafted / name).write_bytes(pickle.dumps(Bomb(victim)))
    else:
        torch.save(Bomb(victim), crafted / name, _use_new_zipfile_serialization=form == "zip")
    # It is armed.
    torch.load(crafted / name, weights_only=False) if form != "pickle" else pickle.loads((crafted / name).read_bytes())
    victim.rmdir()
    refused = ""
    try:
        trainer(tmp_path, 2).train(resume_from_checkpoint=str(crafted))
    except Exception as error:
        refused = str(error).lower()
    # Without a scaler the stock loop fails after it has read the file.
    words = ("weights only", "weights_only", "pickle", "'nonetype' object has no attribute 'load_state_dict'")
    assert not refused or any(word in refused for word in words), refused
    assert not victim.exists()
