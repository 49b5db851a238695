"""A few rows of `benchmarks/chaos.py`, which has the others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "chaos.py"
# Kills while a checkpoint is written, SIGTERM, and kills of an `--overwrite`.
ROWS = ("kill-3", "sigterm", "overwrite")


def test_runs_keep_their_word(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--runs", "1", "--rows", ",".join(ROWS), "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("| none |") == len(ROWS)
