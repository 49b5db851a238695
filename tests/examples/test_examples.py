"""Every example runs by itself, from any folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
# What each script prints when it comes to its end.
LAST_LINES = {
    "adaptive_strategy.py": "weight of each language",
    "fused_head.py": "with teacher heads in bfloat16 and 8 bits",
    "multilingual_student.py": "languages of the student en, sw, ur",
    "own_loop.py": "accuracy of teacher 2",
    "stock_trainer.py": "{'train_runtime'",
}


def test_every_example_is_here() -> None:
    assert {script.name for script in EXAMPLES} == set(LAST_LINES)


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.name)
def test_example(script: Path, tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(LAST_LINES[script.name]), done.stdout
    assert not list(tmp_path.iterdir()), "it leaves files behind"
