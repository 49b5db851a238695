"""Training beside a process that keeps one core busy, with threads that spin while they wait and threads that sleep.

    python benchmarks/bench_busy.py                      two cores, about four minutes
    python benchmarks/bench_busy.py --steps 60 --repeats 5

The student of the demo, its teachers untrained. `spins` is what torch does by itself: the threads of OpenMP, on which
torch's operators and the kernels of this package run, wait for each other in a loop for a while before they sleep.
`sleeps` is OMP_WAIT_POLICY=passive, which the command line sets. Runs take turns; each is a process of its own. The
figure is milliseconds per optimizer step, the median of the runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from cases import machine

# torch is loaded first, so that the command line sets nothing.
_SPINS = "import torch; from amtss_fast.cli import main; raise SystemExit(main())"
_SLEEPS = "from amtss_fast.cli import main; raise SystemExit(main())"
_BUSY = "while True: pass"


def milliseconds_per_step(code: str, steps: int, busy: bool) -> float:
    """Of the student's training in a process of its own."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    }
    other = subprocess.Popen(["taskset", "-c", "0", sys.executable, "-c", _BUSY]) if busy else None
    try:
        with tempfile.TemporaryDirectory() as folder:
            settings = [
                f"output_dir={folder}/run",
                "labels_only=false",
                "teacher_training.max_steps=1",
                f"training.max_steps={steps}",
                "training.eval_strategy=no",
                "training.load_best_model_at_end=false",
                "training.save_strategy=no",
                "training.disable_tqdm=true",
            ]
            subprocess.run(
                [sys.executable, "-c", code, "train", "demo", *settings],
                check=True,
                capture_output=True,
                env=environment,
            )
            logs = [json.loads(line) for line in Path(folder, "run/log.jsonl").read_text().splitlines()]
    finally:
        if other is not None:
            other.kill()
    return 1000 * float(logs[-1]["train_runtime"]) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of a run (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind (default: %(default)s)")
    options = parser.parse_args()
    found: dict[tuple[str, bool], list[float]] = {}
    for _ in range(options.repeats):
        for busy in (False, True):
            for name, code in (("spins", _SPINS), ("sleeps", _SLEEPS)):
                found.setdefault((name, busy), []).append(milliseconds_per_step(code, options.steps, busy))
    print(machine())
    print(f"{'ms per step':14}{'alone':>10}{'beside a busy process':>24}{'ratio':>8}")
    for name in ("spins", "sleeps"):
        alone, beside = (statistics.median(found[name, busy]) for busy in (False, True))
        print(f"{name:14}{alone:10.1f}{beside:24.1f}{beside / alone:8.2f}")


if __name__ == "__main__":
    main()
