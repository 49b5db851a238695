"""Plans under a memory budget: what is given up in which order, and that a run keeps to it with the same loss."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from tiny import tiny_bert_config
from transformers import BertForMaskedLM

from amtss_fast.memory import give_back, make_plan, parse_budget, peak_of, used
from amtss_fast.run import train_tokenizer

WORDS = ["apple", "dog", "cat", "table", "chair", "rain", "red", "under"]
CPU = torch.device("cpu")
MB = 10**6


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [("6GB", 6 * 10**9), ("800MB", 800 * 10**6), ("2GiB", 2 << 30), ("1.5 gb", 15 * 10**8), (7e8, 7 * 10**8)],
)
def test_budgets(text: str | float, bytes_: int) -> None:
    assert parse_budget(text, CPU) == bytes_


@pytest.mark.parametrize("text", ["much", "0GB", "-1GB", "6TB"])
def test_wrong_budgets(text: str) -> None:
    with pytest.raises(ValueError, match=r"memory.budget must be a size such as 6GB, 800MB or 2GiB, or auto"):
        parse_budget(text, CPU)


def test_auto_is_what_is_free() -> None:
    assert used(CPU) < parse_budget("auto", CPU) < 1 << 50


def test_peak_is_that_of_the_run() -> None:
    # What earlier tests have left would be given back while the run is watched.
    give_back()
    before = used(CPU)

    def run() -> None:
        torch.ones(50_000_000).sum()

    # A second run has a peak of its own, though the process has been higher.
    assert peak_of(run, CPU) - before > 190 * MB
    assert peak_of(lambda: None, CPU) - before < 60 * MB


def fake_teachers(
    activations: float, static: dict[str, float], tried: list[tuple[str, int, bool]]
) -> Callable[[str], object]:
    """Megabytes of a step: the teachers' and those of each row, an eighth of them with checkpointing."""

    @contextmanager
    def teachers(precision: str) -> Iterator[Callable[[int, bool, int], int]]:
        if static[precision] > 1000:
            raise MemoryError

        def peak(micro_batch: int, checkpointing: bool, accumulation: int) -> int:
            assert micro_batch * accumulation == 64
            tried.append((precision, micro_batch, checkpointing))
            return int(MB * (static[precision] + activations * micro_batch / (8 if checkpointing else 1)))

        yield peak

    return teachers


@pytest.mark.parametrize(
    ("activations", "static", "plan"),
    [
        (10, 200, ("as configured", 64, 1, False, False)),
        (15, 200, ("as configured", 32, 2, False, False)),
        (40, 200, ("as configured", 16, 4, False, False)),
        (200, 200, ("as configured", 16, 4, True, False)),
        (4000, 200, ("as configured", 1, 64, True, False)),
        (10, 910, ("as configured", 8, 8, True, False)),
        (10, 960, ("bfloat16", 32, 2, False, True)),
        (10, 2000, ("int8", 32, 2, False, True)),
    ],
)
def test_what_is_given_up_first(activations: float, static: float, plan: tuple[object, ...]) -> None:
    tried: list[tuple[str, int, bool]] = []
    sizes = {"as configured": static, "bfloat16": static / 2, "int8": static / 4}
    got = make_plan(1000 * MB, 64, 1, list(sizes), fake_teachers(activations, sizes, tried), chunk_rows=7)
    assert (got.precision, got.micro_batch, got.accumulation, got.checkpointing, got.approximate) == plan
    assert got.expected <= 920 * MB
    assert got.chunk_rows == 7
    assert ("(approximate)" in got.describe()) == got.approximate
    # Nothing is tried that is expected not to fit, but for the first two micro-batches, which tell what to expect.
    for precision, micro_batch, checkpointing in tried:
        needed = sizes[precision] + activations * micro_batch / (8 if checkpointing else 1)
        assert needed <= 920 or micro_batch <= 2


def test_too_small_a_budget() -> None:
    sizes = {"as configured": 980.0, "bfloat16": 940.0}
    with pytest.raises(ValueError, match=r"budget = 1.00 GB is too small .* as configured or bfloat16; .* 1.02 GB"):
        make_plan(1000 * MB, 64, 1, list(sizes), fake_teachers(1, sizes, []))
    with pytest.raises(ValueError, match="too small for these models"):
        make_plan(1000 * MB, 64, 1, ["int8"], fake_teachers(1, {"int8": 5000.0}, []))


def test_a_run_keeps_its_loss(tmp_path: Path) -> None:
    """The peaks are made up: one budget leaves room for the whole batch, the other for eight rows at a time."""
    tokenizer = train_tokenizer([f"{a} {b}" for a in WORDS for b in WORDS], 320, mask=True)
    config = tiny_bert_config(len(tokenizer), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    for folder in (tmp_path / "a", tmp_path / "b"):
        BertForMaskedLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    rows = [{"text": f"{a} {b}", "language": "en"} for a in WORDS for b in WORDS]
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:9]))
    student = config.to_diff_dict() | {"model_type": "bert"}
    values = {
        "task": "masked-lm",
        "data": {"name": str(data), "label": None, "mask_probability": 0.5},
        "tokenizer": {"path": str(tmp_path / "a")},
        "student": {"encoder": student},
        "teachers": [{"name": name, "path": str(tmp_path / name)} for name in "ab"],
        "training": {
            "max_steps": 2, "per_device_train_batch_size": 32, "logging_steps": 1, "use_cpu": True,
            "disable_tqdm": True, "report_to": "none", "save_strategy": "no",
        },
    }  # fmt: skip
    made_up = """
from amtss_fast import run
rows = []
collate = run.LanguageModelCollator.__call__
run.LanguageModelCollator.__call__ = lambda self, batch: (rows.append(len(batch)), collate(self, batch))[1]
run.peak_of = lambda step, device: (step(), int(4e8 + 5e7 * rows[-1]))[1]
"""
    for name, budget in (("whole", "4GB"), ("short", "1GB")):
        config_ = values | {"output_dir": str(tmp_path / "runs" / name), "memory": {"budget": budget}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config_))
    script = f"""{made_up}
from amtss_fast.cli import main
for name in ("whole", "short"):
    assert main(["--trace", "train", f"{tmp_path}/{{name}}.yaml"]) == 0
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("Memory: budget")]
    assert "micro-batch 32 x 1, gradient checkpointing off" in lines[0]
    assert "micro-batch 8 x 4, gradient checkpointing off" in lines[1]
    folders = [tmp_path / "runs" / name for name in ("whole", "short")]
    plans = [json.loads((folder / "metrics.json").read_text())["memory"] for folder in folders]
    assert [plan["micro_batch"] for plan in plans] == [32, 8]
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in folders]
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in logs]
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
