"""The benchmark's command line runs, checks that the rivals agree, and writes what it measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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
