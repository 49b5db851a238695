"""The benchmark's command line runs, checks that the rivals agree, and writes what it measured."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny import tiny_bert_config, tiny_tokenizer
from transformers import BertModel

from amtss_fast import AdaptiveStrategy, AMTSSForSequenceClassification, amtss_loss
from amtss_fast.teachers.int8 import why_missing

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_loss.py"


def test_bench_loss(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--case", "64,2,3", "--rivals", "native,torch", "--seconds", "0.2"]
    done = subprocess.run([*command, "--json", str(file)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    assert [row["rival"] for row in figures["rows"]] == ["native", "torch"]
    assert all(row["median_ms"] > 0 for row in figures["rows"])
    assert {"date", "cpu", "torch"} <= set(figures["machine"])

    again = [*command, "--json", str(file), "--resume", "--case", "32,2,3"]
    done = subprocess.run(again, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    resumed = json.loads(file.read_text())
    assert resumed["machine"] == figures["machine"]
    assert resumed["rows"][:2] == figures["rows"]
    assert [row["case"] for row in resumed["rows"][2:]] == ["N=32 K=2 C=3 float32"] * 2


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
def test_bench_loss_on_a_gpu_that_is_none(tmp_path: Path) -> None:
    """What the benchmark does where there is a GPU, with the clock in place of its events and Triton interpreted."""
    script = f"""
import sys, time, types
import torch
import bench_loss, cases
import liger_kernel.transformers as liger

class Eps(float):
    # Triton's interpreter leaves floats as they are, and Liger's kernel converts this one.
    def to(self, dtype): return self

class Event:
    def __init__(self, enable_timing): assert enable_timing
    def record(self): self.time = time.perf_counter()
    def synchronize(self): pass
    def elapsed_time(self, end): return 1e3 * (end.time - self.time)

for name, value in {{"is_available": True, "get_device_name": "none", "reset_peak_memory_stats": None,
                    "get_device_properties": types.SimpleNamespace(warp_size=32),
                    "memory_allocated": 100, "max_memory_allocated": 2000}}.items():
    setattr(torch.cuda, name, lambda value=value: value)
torch.cuda.Event = Event
liger_loss = liger.LigerKLDIVLoss
liger.LigerKLDIVLoss = lambda **options: liger_loss(Eps(1e-10), **options)
bench_loss.default_device = lambda: "cpu"
bench_loss.measure_limits = lambda: cases.Limits(1e9, None)
cases.native = lambda s, t, y: cases.amtss_loss(s, t, y, temperature=cases.TEMPERATURE, backend="triton")
sys.argv = ["bench_loss.py", "--case", "8,1,5", "--case", "8,2,5", "--rivals", "native,torch,liger", "--seconds", "0.1"]
sys.argv += ["--results", {str(tmp_path)!r}]
bench_loss.main()
"""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(SCRIPT.parent)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "loss_cpu.json").read_text())
    assert [row["rival"] for row in figures["rows"]] == ["native", "torch", "liger", "native", "torch"]
    assert figures["machine"]["gpu"] == "none"
    assert figures["machine"]["copy_gb_per_s"] == 1.0
    assert all(row["floor_ratio"] == pytest.approx(row["median_ms"] * 1e6 / (8 * 5 * 4 * k))
               for row, k in zip(figures["rows"], (3, 3, 3, 4, 4), strict=True))  # fmt: skip
    # Less the gradient, which every rival has to give.
    assert all(row["memory_mb"] == pytest.approx((1900 - 8 * 5 * 4) / 1e6) for row in figures["rows"])
    assert "gpu,runtime,triton" in (tmp_path / "loss_cpu.csv").read_text()
    assert (tmp_path / "loss_cpu.png").stat().st_size > 1000


def test_bench_linear(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    script = SCRIPT.with_name("bench_linear.py")
    command = [sys.executable, str(script), "--case", "512,8,1,20000", "--case", "300,8,2,50,bfloat16"]
    command += ["--rivals", "native,torch,liger,products"]
    done = subprocess.run(
        [*command, "--seconds", "0.2", "--json", str(file)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert all(row["median_ms"] > 0 for row in rows)
    figures = {row["rival"]: row for row in rows if row["case"] == "N=512 H=8 K=1 C=20000"}
    assert set(figures) == {"native", "torch", "liger", "products"}
    assert figures["native"]["memory_mb"] < 0.8 * figures["torch"]["memory_mb"]
    half = {row["rival"]: row for row in rows if row["case"] == "N=300 H=8 K=2 C=50 bfloat16"}
    assert set(half) == {"native", "torch", "products"}
    assert all(0 < half[rival]["head_error"] < 0.02 for rival in ("native", "torch"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rivals_of_the_heads_must_agree(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    bench = importlib.import_module("bench_linear")
    case = bench.LinearCase(300, 8, 2, 50, dtype)
    inputs = case.inputs("cpu")
    for divergence in bench.DIVERGENCES:
        losses = bench.rivals(case, ["native", "torch"], divergence)
        bench.check_agreement(losses, inputs, divergence)
        with pytest.raises(AssertionError, match="wrong: loss, gradients of hidden states and head are"):
            bench.check_agreement(losses | {"wrong": lambda x, f=losses["torch"]: 1.05 * f(x)}, inputs, divergence)


def test_bench_divergences(tmp_path: Path) -> None:
    file, script = tmp_path / "figures.json", SCRIPT.with_name("bench_divergences.py")
    command = [sys.executable, str(script), "--case", "64,2,3", "--divergences", "jsd,tvd", "--seconds", "0.1"]
    done = subprocess.run([*command, "--json", str(file)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    assert [row["rival"] for row in figures["rows"]] == ["forward_kl", "jsd", "tvd"]


def test_gpu_report(tmp_path: Path) -> None:
    """From a checkout that nobody has installed, in Triton's interpreter."""
    pytest.importorskip("triton")
    file = tmp_path / "report.jsonl"
    script = f"""
import runpy, sys
sys.meta_path = [finder for finder in sys.meta_path if "amtss" not in repr(finder).lower()]
sys.path[:0] = [{str(SCRIPT.parent)!r}]
sys.argv = ["gpu_report.py", "--seconds", "0", "--json", {str(file)!r}]
runpy.run_path({str(SCRIPT.parent / "gpu_report.py")!r}, run_name="__main__")
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads(line) for line in file.read_text().splitlines()]
    assert results[0]["instruction_set"] == "none"
    summary = results[-1]
    assert (summary["part"], summary["wrong"], summary["failed"], summary["left_out"]) == ("summary", 0, 0, [])
    assert {"smoke", "bits", "speed", "bound", "sweep", "host", "divergence"} <= {result["part"] for result in results}
    assert {result["way"] for result in results if "way" in result} == {"copy", "one read", "two reads"}


def test_experts_agree_with_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark's steps check each other before they are timed."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    bench = importlib.import_module("bench_experts")
    for steps, wanting in (bench.lists(6, 300, 5), bench.routed(40, 3, 50, 8)):
        for step in steps.values():
            assert step().isfinite()
        assert all(tensor.grad is not None for tensor in wanting)


def test_students_side_by_side_are_the_librarys_student_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    side = importlib.import_module("students")
    torch.manual_seed(3)
    n, n_languages, n_classes = 90, 3, 5
    ids, truth = torch.arange(n) % n_languages, torch.randint(n_classes, (n,))
    labels = truth.masked_fill(torch.rand(n) < 0.3, -1)
    teachers = torch.randn(3, n, n_classes) + torch.tensor([3.0, 1.0, 0.0]).view(3, 1, 1) * torch.eye(n_classes)[truth]
    student = AMTSSForSequenceClassification.from_encoder(
        tiny_bert_config(), languages=["en", "sw", "tr"], num_labels=n_classes, classifier_dropout=0.0
    ).eval()
    student.encoder.requires_grad_(False)
    tokens = torch.randint(300, (n, 7))
    x = student.features(tokens, language_ids=ids).detach()
    s = side.Situation(
        x=x,
        labels=labels,
        truth=truth,
        language_ids=ids,
        teacher_logits=teachers,
        calibration=(teachers[:, :30], truth[:30], ids[:30]),
        own=torch.ones(3, n_languages, dtype=torch.bool),
        x_eval=x,
        labels_eval=truth,
        language_eval=ids,
        concepts_eval=None,
        steps=40,
        teacher_right=None,
    )
    variants = [
        side.Variant(kd_weights=(0.3, 0.9), betas=(0.0, 0.2, side.INF)),
        side.Variant("adaptive", betas=(0.5,), prior_temperatures=(0.1, 0.2)),
        side.Variant("adaptive", betas=(2.0,), weighting="label_nll"),
        side.Variant("adaptive", prior_temperatures=(side.INF,), gap_temperatures=(0.1,)),
    ]
    wanted = [(variant, setting) for variant in variants for setting in variant.settings()]
    stack, targets = side.fit(s, wanted, 0, dropout=0.0)
    together = stack.logits(x, ids)
    assert targets[0] > targets[2]  # the best teacher of each row, and all alike
    assert (together - together[0]).abs().amax((1, 2))[1:].min() > 0.01  # each is another student

    for number, (variant, setting) in enumerate(wanted):
        torch.manual_seed(0)
        alone = copy.deepcopy(student)
        alone.classifiers[0].load_state_dict(torch.nn.Linear(16, n_classes).state_dict())
        adaptive = AdaptiveStrategy(
            3,
            n_languages,
            importance_temperature=setting["prior_temperature"] if variant.prior == "adaptive" else None,
            gap_temperature=setting["gap_temperature"],
        )
        options = {"temperature": side.TEMPERATURE, "weighting": variant.weighting, "return_stats": True}
        adaptive.start(amtss_loss(teachers[0, :30], teachers[:, :30], truth[:30], **options)[1].margins, ids[:30])
        adaptive.step()
        optimizer = torch.optim.AdamW((p for p in alone.parameters() if p.requires_grad), 2e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, s.steps)
        for rows in side.batches(ids, n_languages, side.ROWS_PER_LANGUAGE, s.steps):
            loss, stats = amtss_loss(
                alone(tokens[rows], language_ids=ids[rows]).logits,
                teachers[:, rows],
                labels[rows],
                weight_temperature=setting["beta"],
                teacher_prior=adaptive.teacher_prior(ids[rows]),
                sample_weight=adaptive.sample_weight(ids[rows]),
                kd_weight=setting["kd_weight"],
                ce_weight=1 - setting["kd_weight"],
                **options,
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            adaptive.update(stats, ids[rows], row_mask=labels[rows] >= 0)
            adaptive.step()
        with torch.no_grad():
            logits = alone(tokens, language_ids=ids).logits
        assert (together[number] - logits).abs().max() < 1e-3, setting


def test_bench_quality(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "encoder")
    BertModel(tiny_bert_config(num_hidden_layers=12), add_pooling_layer=False).save_pretrained(tmp_path / "encoder")
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT.with_name("bench_quality.py")), "--encoder", str(tmp_path / "encoder")]
    command += ["--cache", str(tmp_path / "cache"), "--languages", "en,sw,tr", "--json", str(figures)]
    command += ["--quick", "--tune-seeds", "1", "--seeds", "2"]
    command += ["--variants", "adaptive importance;own teacher", "--designs", "transfer;new language"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads(figures.read_text())
    found = results["transfer"]["test"]
    assert set(found) == {"labels only", "uniform", "adaptive importance"}
    assert found["uniform"]["minus_uniform"] == {"points": 0, "low": 0, "high": 0}
    gain = found["adaptive importance"]["minus_labels"]
    assert gain["low"] <= gain["points"] <= gain["high"]
    difference = found["adaptive importance"]["accuracy"] - found["labels only"]["accuracy"]
    assert abs(100 * difference - gain["points"]) < 1e-6
    assert len(found["uniform"]["per_seed"]) == 2
    assert "own teacher" in results["new language"]["test"]
    shown = subprocess.run([*command[:2], "--show", str(figures)], capture_output=True, text=True, timeout=300)
    assert shown.stdout.startswith("### Transfer\n\n| variant |"), shown.stderr
    assert "\n### New language\n" in shown.stdout


def test_the_tables_of_the_weightings_are_those_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    quality = importlib.import_module("bench_quality")
    root = SCRIPT.parents[1]
    results = json.loads((root / "benchmarks" / "results" / "quality.json").read_text(encoding="utf-8"))
    page = (root / "docs" / "weighting.md").read_text(encoding="utf-8")
    assert page.partition("\n## Tables\n\n")[2].strip() == quality.show(results)


@pytest.mark.skipif(why_missing("onednn") is not None, reason=str(why_missing("onednn")))
def test_bench_teachers(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT.with_name("bench_teachers.py")), "--layers", "1", "--vocabulary", "500"]
    command += ["--engines", "float32,onednn", "--seconds", "0.1", "--rounds", "1", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = {row["engine"]: row for row in json.loads(file.read_text())["speed"]["rows"]}
    assert set(figures) == {"float32", "onednn"}
    assert figures["onednn"]["weights_share"] < 0.4
    assert figures["float32"]["full_speedup"] == figures["float32"]["padded_speedup"] == 1


@pytest.mark.skipif(why_missing("onednn") is not None, reason=str(why_missing("onednn")))
def test_bench_train(tmp_path: Path) -> None:
    script = SCRIPT.with_name("bench_train.py")
    config = yaml.safe_load(script.with_suffix(".yaml").read_text())
    config["data"]["languages"] = ["en", "sw"]
    config["tokenizer"]["vocab_size"] = 400
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 64}
    for model in (config["student"], *(teacher["model"] for teacher in config["teachers"])):
        model["encoder"] |= small
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    ways = ["plain", "int8", "cached", *(["textbrewer"] if importlib.util.find_spec("textbrewer") else [])]
    file = tmp_path / "figures.json"
    command = [sys.executable, str(script), "--config", str(tmp_path / "tiny.yaml"), "--ways", ",".join(ways)]
    command += ["--rows", "64", "--test-rows", "32", "--epochs", "2", "--teacher-steps", "2"]
    command += ["--output-dir", str(tmp_path / "run"), "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = {row["way"]: row for row in json.loads(file.read_text())["ways"]}
    assert list(figures) == ways
    for row in figures.values():
        assert row["steps"] == 4
        parts = row["teachers_s"] + row["student_s"] + row["loss_s"] + row["data_s"]
        assert parts == pytest.approx(row["seconds"])
        assert min(row["teachers_s"], row["student_s"]) > 0
        assert row["speedup"] == pytest.approx(figures["plain"]["seconds"] / row["seconds"])


def test_long_runs() -> None:
    command = [sys.executable, str(SCRIPT.with_name("long_runs.py")), "--parts", "cached", "--steps", "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| cached |") == 10


def test_what_grows_in_long_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    bench = importlib.import_module("long_runs")
    flat = [bench.Sample(step, 500_000_000, 12, 7) for step in range(1, 11)]
    # What the first steps take is no growth.
    assert bench.growth([flat[0]._replace(rss=10, files=3, threads=1), *flat[1:]]) == []
    assert bench.growth([*flat[:9], flat[9]._replace(rss=508_000_000)]) == ["memory by 8.0 MB"]
    assert bench.growth(bench.measure("loss", 300)) == []
    found = bench.growth([*flat[:5], flat[5]._replace(files=13, threads=9), *flat[6:]])
    assert found == ["files from 12 to 13", "threads from 7 to 9"]
