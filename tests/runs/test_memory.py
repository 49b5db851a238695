"""Plans under a memory budget: what is given up in which order, and that a run keeps to it with the same loss."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from tiny import tiny_bert_config
from transformers import BertForMaskedLM

from amtss_fast._system.memory import give_back, peak_of, used
from amtss_fast.data import train_tokenizer
from amtss_fast.runs.config import MemoryConfig, load_config
from amtss_fast.runs.fitting import _loadings
from amtss_fast.runs.memory_plan import Loading, make_plan, parse_budget
from amtss_fast.runs.setup import prepare

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


AS_IT_IS, IN_TURNS = Loading(), Loading(resident=1)


def fake_teachers(
    activations: float, static: dict[Loading, float], tried: list[tuple[Loading, int, bool]]
) -> Callable[[str], object]:
    """Megabytes of a step: the teachers' and those of each row, an eighth of them with checkpointing."""

    @contextmanager
    def teachers(loading: Loading) -> Iterator[Callable[[int, bool, int], int]]:
        if static[loading] > 1000:
            raise MemoryError

        def peak(micro_batch: int, checkpointing: bool, accumulation: int) -> int:
            assert micro_batch * accumulation == 64
            tried.append((loading, micro_batch, checkpointing))
            return int(MB * (static[loading] + activations * micro_batch / (8 if checkpointing else 1)))

        yield peak

    return teachers


@pytest.mark.parametrize(
    ("activations", "static", "plan"),
    [
        (10, 200, (AS_IT_IS, 64, 1, False, False)),
        (15, 200, (AS_IT_IS, 32, 2, False, False)),
        (40, 200, (AS_IT_IS, 16, 4, False, False)),
        (200, 200, (AS_IT_IS, 16, 4, True, False)),
        (4000, 200, (AS_IT_IS, 1, 64, True, False)),
        (10, 910, (AS_IT_IS, 8, 8, True, False)),
        (10, 960, (IN_TURNS, 32, 2, False, False)),
        (10, 2000, (IN_TURNS, 16, 4, False, False)),
        (10, 2900, (Loading("bfloat16", 1), 32, 2, False, True)),
        (10, 6000, (Loading("int8"), 16, 4, False, True)),
    ],
)
def test_what_is_given_up_first(activations: float, static: float, plan: tuple[object, ...]) -> None:
    tried: list[tuple[Loading, int, bool]] = []
    shares = {AS_IT_IS: 1, IN_TURNS: 3, Loading("bfloat16"): 2, Loading("bfloat16", 1): 6, Loading("int8"): 8}
    sizes = {loading: static / share for loading, share in shares.items()}
    got = make_plan(1000 * MB, 64, 1, list(sizes), fake_teachers(activations, sizes, tried), chunk_rows=7)
    found = Loading(got.precision, got.resident), got.micro_batch, got.accumulation, got.checkpointing, got.approximate
    assert found == plan
    assert got.expected <= 920 * MB
    assert got.chunk_rows == 7
    assert ("(approximate)" in got.describe()) == got.approximate
    assert ("1 at a time on the device" in got.describe()) == (got.resident == 1)
    # Nothing is tried that is expected not to fit, but for the first two micro-batches, which tell what to expect.
    for loading, micro_batch, checkpointing in tried:
        needed = sizes[loading] + activations * micro_batch / (8 if checkpointing else 1)
        assert needed <= 920 or micro_batch <= 2


def test_too_small_a_budget() -> None:
    sizes = {AS_IT_IS: 980.0, Loading("bfloat16"): 940.0}
    with pytest.raises(ValueError, match=r"budget = 1.00 GB is too small .* as configured or bfloat16; .* 1.02 GB"):
        make_plan(1000 * MB, 64, 1, list(sizes), fake_teachers(1, sizes, []))
    with pytest.raises(ValueError, match="too small for these models"):
        make_plan(1000 * MB, 64, 1, [AS_IT_IS], fake_teachers(1, {AS_IT_IS: 5000.0}, []))


def test_ways_to_load_the_teachers(tmp_path: Path) -> None:
    """Taking turns is for GPUs and exact; fewer bits are approximate."""
    base = prepare(load_config("demo", ["data.languages=[en]", "tokenizer.vocab_size=600", "training.use_cpu=true"]))

    def ways(device: str, *settings: str, approximate: bool = True) -> list[Loading]:
        config = load_config("demo", [f"output_dir={tmp_path}", *settings])
        setup = replace(base, config=config, device=torch.device(device))
        return _loadings(setup, MemoryConfig(budget="1GB", approximate=approximate))

    bfloat16, int8 = Loading("bfloat16"), Loading("int8")
    assert ways("cpu") == [AS_IT_IS, bfloat16, int8]
    assert ways("cuda") == [AS_IT_IS, IN_TURNS, bfloat16, Loading("bfloat16", 1), int8]
    assert ways("cuda", approximate=False) == [AS_IT_IS, IN_TURNS]
    assert ways("cuda", "teachers_resident=2") == [AS_IT_IS, bfloat16, int8]
    assert ways("cuda", "teachers.0.precision=int8") == [AS_IT_IS]
    assert ways("cuda", "teacher_cache.path=cache") == [AS_IT_IS]


def test_a_run_keeps_its_budget_and_its_loss(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([f"{a} {b}" for a in WORDS for b in WORDS], 320, mask=True)
    config = tiny_bert_config(
        len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    for folder in (tmp_path / "a", tmp_path / "b"):
        BertForMaskedLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    rows = [{"text": " ".join([a, *WORDS * 6, b]), "language": "en"} for a in WORDS for b in WORDS] * 4
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:9]))
    student = config.to_diff_dict() | {"model_type": "bert"}
    values = {
        "task": "masked-lm",
        "data": {"name": str(data), "label": None, "max_length": 64},
        "tokenizer": {"path": str(tmp_path / "a")},
        "student": {"encoder": student},
        "teachers": [{"name": name, "path": str(tmp_path / name)} for name in "ab"],
        "training": {
            "max_steps": 2, "per_device_train_batch_size": 128, "logging_steps": 1, "use_cpu": True,
            "disable_tqdm": True, "report_to": "none", "save_strategy": "no",
        },
        "output_dir": "",
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))

    # In a process that does nothing else: what earlier tests have left would count.
    script = f"""
import json, shutil
from pathlib import Path
import torch
from amtss_fast.cli import main
from amtss_fast._system.memory import give_back, used
from amtss_fast.runs.memory_plan import _FILL
runs = Path({str(tmp_path / "runs")!r})
def train(name, budget, *more):
    settings = [f"output_dir={{runs / name}}", f"memory.budget={{budget}}", *more]
    assert main(["--trace", "train", {str(tmp_path / "config.yaml")!r}, *settings]) == 0
    return json.loads((runs / name / "memory.json").read_text())
whole = train("whole", "64GB")["measured"]
give_back()
# Half of what a whole batch needs beyond the models: libraries alone are of another size on every machine.
budget = int((used(torch.device("cpu")) + whole) / 2 / _FILL)
plan = train("short", budget)
# An interrupted run goes on with the plan that it has, whatever a new look would find.
shutil.copytree(runs / "short", runs / "again")
shutil.rmtree(runs / "again" / "student")
config = runs / "again" / "config.yaml"
config.write_text(config.read_text().replace(str(runs / "short"), str(runs / "again")))
(runs / "again" / "memory.json").write_text(json.dumps(plan | dict(micro_batch=16, accumulation=8)))
train("again", budget, "--resume")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Memory: budget") == 3

    plans, losses = {}, {}
    for name in ("whole", "short", "again"):
        folder = tmp_path / "runs" / name
        plans[name] = json.loads((folder / "memory.json").read_text())
        assert json.loads((folder / "metrics.json").read_text())["memory"] == plans[name]
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        losses[name] = [entry["loss"] for entry in log if "loss" in entry]
        assert plans[name]["micro_batch"] * plans[name]["accumulation"] == 128
        assert not plans[name]["approximate"]
    assert plans["whole"]["micro_batch"] == 128
    assert plans["short"]["micro_batch"] < 128
    assert plans["again"]["micro_batch"] == 16
    assert plans["short"]["measured"] <= plans["short"]["budget"]
    for name in ("whole", "short"):
        assert plans[name]["measured"] == pytest.approx(plans[name]["expected"], rel=0.15)
    assert len(losses["whole"]) == 2
    assert losses["short"] == pytest.approx(losses["whole"], rel=1e-4)
    assert losses["again"] == pytest.approx(losses["whole"], rel=1e-4)
