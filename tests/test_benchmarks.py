"""The benchmark's command line runs, checks that the rivals agree, and writes what it measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tiny import tiny_bert_config, tiny_tokenizer
from transformers import BertModel

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "bench_loss.py"


def test_bench_loss(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--case", "64,2,3", "--rivals", "native,torch", "--seconds", "0.2"]
    done = subprocess.run([*command, "--json", str(file)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    assert [row["rival"] for row in figures["rows"]] == ["native", "torch"]
    assert all(row["median_ms"] > 0 for row in figures["rows"])
    assert {"date", "cpu", "torch"} <= set(figures["machine"])


def test_bench_linear(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    script = SCRIPT.with_name("bench_linear.py")
    command = [sys.executable, str(script), "--case", "512,8,1,20000", "--rivals", "native,torch,liger,products"]
    done = subprocess.run(
        [*command, "--seconds", "0.2", "--json", str(file)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    figures = {row["rival"]: row for row in json.loads(file.read_text())["rows"]}
    assert set(figures) == {"native", "torch", "liger", "products"}
    assert all(row["median_ms"] > 0 for row in figures.values())
    assert figures["native"]["memory_mb"] < 0.8 * figures["torch"]["memory_mb"]


def test_bench_quality(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "encoder")
    BertModel(tiny_bert_config(num_hidden_layers=12), add_pooling_layer=False).save_pretrained(tmp_path / "encoder")
    tuned, tested = tmp_path / "tuned.json", tmp_path / "tested.json"
    command = [sys.executable, str(SCRIPT.with_name("bench_quality.py")), "--encoder", str(tmp_path / "encoder")]
    command += ["--cache", str(tmp_path / "cache"), "--languages", "en,sw,tr", "--variants", "adaptive importance"]
    command += ["--quick", "--tune-seeds", "1", "--designs"]
    for options in (
        ["transfer", "--tune-only", "--json", str(tuned)],
        ["transfer,new language", "--chosen", str(tuned), "--seeds", "2", "--json", str(tested)],
    ):
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert "test" not in json.loads(tuned.read_text())["transfer"]
    results = json.loads(tested.read_text())
    found = results["transfer"]["test"]
    assert set(found) == {"labels only", "uniform", "adaptive importance"}
    assert found["uniform"]["minus_uniform"] == {"points": 0, "low": 0, "high": 0}
    gain = found["adaptive importance"]["minus_labels"]
    assert gain["low"] <= gain["points"] <= gain["high"]
    difference = found["adaptive importance"]["accuracy"] - found["labels only"]["accuracy"]
    assert abs(100 * difference - gain["points"]) < 1e-6
    assert len(found["uniform"]["per_seed"]) == 2
    assert "own teacher" in results["new language"]["test"]
