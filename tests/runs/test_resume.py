"""A training goes on where it stopped, also after its last step and in a folder that has moved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from test_preflight import TRAINING, rows, settings, write
from tiny import tiny_teacher

from amtss_fast.cli import main
from amtss_fast.runs.folder import RunFolder

STEPS = 3
# Otherwise the learning rate is 0 after the last step, and a step too many changes nothing.
STEPPED = TRAINING | {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
STEPPED |= {"lr_scheduler_type": "constant"}
BEST = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "loss"}


def interrupted(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the last step, before the student is kept."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(RunFolder, "keep_model", stop)
        assert main(["train", str(config)]) == 130


@pytest.mark.parametrize(
    ("more", "moved"),
    [({}, False), (BEST, True), ({"num_train_epochs": 1, "max_steps": -1}, False)],
    ids=["steps", "best", "epochs"],
)
def test_after_the_last_step(
    more: dict[str, Any], moved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path / "data", train=rows(24), validation=rows(8), test=rows(8))
    teacher = tiny_teacher(tmp_path / "t", labels=("neg", "pos"))
    config = settings(tmp_path / "c.yaml", data, [{"name": "t", "path": str(teacher)}], training=STEPPED | more)
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    assert main(["train", str(config), f"output_dir={tmp_path / 'whole'}"]) == 0
    interrupted(config, monkeypatch)
    assert not (run / "student").exists()
    if moved:
        run = run.rename(elsewhere)
    assert main(["train", str(config), "--resume", f"output_dir={run}"]) == 0
    there, here = (load_file(folder / "student" / "model.safetensors") for folder in (tmp_path / "whole", run))
    assert all((there[name] == here[name]).all() for name in there)
    assert sorted(path.name for path in (run / "training" / "student").glob("checkpoint-*")) == [
        f"checkpoint-{step + 1}" for step in range(STEPS)
    ]
    logs = [(folder / "log.jsonl").read_text().splitlines() for folder in (tmp_path / "whole", run)]
    losses = [[e["loss"] for e in map(json.loads, lines) if "loss" in e] for lines in logs]
    assert losses[0] == losses[1]
    assert len(losses[0]) == STEPS
