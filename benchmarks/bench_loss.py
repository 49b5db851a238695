"""Forward + backward of the loss on the GPU or else the CPU, beside plain torch and torch.compile of the same formula.

    python benchmarks/bench_loss.py                        the named cases
    python benchmarks/bench_loss.py --grid                 K in 1 to 16, C in 2 to 250,002
    python benchmarks/bench_loss.py --case 1024,4,5000     N, K, C and, if you like, a dtype
    python benchmarks/bench_loss.py --json FILE --csv FILE --picture FILE
    python benchmarks/bench_loss.py --results FOLDER       all three, named after the device
    python benchmarks/bench_loss.py --grid --json FILE --resume     go on with the cases that FILE lacks

Every case first checks that the rivals agree. Times are medians of interleaved runs with their quartiles; a run is
forward, backward and the release of the gradient. GB/s counts each logit read once and each gradient written once. The
floor is the larger of these bytes at the speed of a copy and one exponential per logit at the speed of the kernel's own
exponential in cache. Memory is the peak beyond the inputs and the gradient. On a GPU times lie between events of the
device and the floor is the bytes alone; `graph` is the native step replayed as a CUDA graph, which leaves the kernels'
time. Liger-Kernel's KL joins in there at K = 1 if it is installed.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import torch
from cases import (
    NAMED,
    Case,
    Limits,
    Loss,
    captured,
    check_agreement,
    default_device,
    grid,
    machine,
    measure_limits,
    peak_memory,
    rivals,
    step,
    time_interleaved,
)

from amtss_fast._system.files import write_atomically

Row = dict[str, str | int | float]


def bench(case: Case, names: list[str], limits: Limits, seconds: float) -> list[Row]:
    """One row of figures for each rival."""
    student, teachers, labels = case.inputs(default_device())
    if case.k > 1 or not torch.cuda.is_available() or importlib.util.find_spec("liger_kernel") is None:
        names = [name for name in names if name != "liger"]
    losses = rivals([name for name in names if name != "graph"])
    check_agreement(losses, student, teachers, labels)

    def run(loss_fn: Loss) -> None:
        step(loss_fn, student, teachers, labels)
        # Each rival pays for freeing its own gradient. The next one would, otherwise.
        student.grad = None

    runs: dict[str, Callable[[], object]] = {name: functools.partial(run, f) for name, f in losses.items()}
    if "graph" in names and torch.cuda.is_available():
        runs["graph"] = captured(runs["native"])
    timings = time_interleaved(runs, seconds)
    rows: list[Row] = []
    for name, timing in timings.items():
        memory = peak_memory(runs[name]) - student.nbytes
        rows.append(
            {
                "case": str(case),
                "rival": name,
                **timing.figures(),
                "gb_per_s": case.bytes / timing.median / 1e9,
                "floor_ratio": timing.median / limits.floor(case),
                "times_native": timing.median / timings["native"].median,
                "memory_mb": max(0, memory) / 1e6,
            }
        )
    return rows


def draw(rows: list[Row], about: dict[str, str | int | float], path: Path) -> None:
    """Times over the floor of each case, a bar for each rival."""
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(str(row["case"]) for row in rows))
    names = list(dict.fromkeys(str(row["rival"]) for row in rows))
    figure = Figure(figsize=(9, 1 + 0.5 * len(cases)), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(names):
        own = [row for row in rows if row["rival"] == name]
        places = [cases.index(str(row["case"])) + i / (len(names) + 1) for row in own]
        axes.barh(places, [float(row["floor_ratio"]) for row in own], height=0.9 / (len(names) + 1), label=name)
    axes.set_yticks([i + (len(names) - 1) / (len(names) + 1) / 2 for i in range(len(cases))], cases)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("time / floor")
    axes.set_title(f"{about.get('gpu', about['cpu'])}, torch {about['torch']}, {str(about['date'])[:10]}")
    axes.legend()
    figure.savefig(path)


def parse_case(text: str) -> Case:
    n, k, c, *dtype = text.split(",")
    return Case(int(n), int(k), int(c), getattr(torch, dtype[0]) if dtype else torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=parse_case, action="append", metavar="N,K,C[,DTYPE]")
    parser.add_argument("--grid", action="store_true", help="K and C over their range")
    parser.add_argument(
        "--rivals", default="native,graph,torch,compile,liger", help="comma-separated (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=10, help="for each case (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    parser.add_argument("--picture", type=Path, metavar="FILE")
    parser.add_argument("--results", type=Path, metavar="FOLDER")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the JSON file has, and its limits")
    args = parser.parse_args()
    if args.results:
        args.results.mkdir(parents=True, exist_ok=True)
        path = args.results / f"loss_{default_device()}"
        args.json, args.csv, args.picture = (path.with_suffix(end) for end in (".json", ".csv", ".png"))
    names = args.rivals.split(",")
    if "native" not in names:
        parser.error("--rivals must name native: the others are compared with it")

    if args.resume and not args.json:
        parser.error("--resume needs --json or --results")

    torch.set_num_threads(args.threads)
    rows: list[Row] = []
    about = machine()
    if args.resume and args.json.exists():
        kept = json.loads(args.json.read_text())
        rows, before = kept["rows"], kept["machine"]
        if changed := [key for key in about if key != "date" and about[key] != before.get(key)]:
            parser.error(f"--resume: {args.json} is of another {', '.join(changed)}")
        about = before
        limits = Limits(about["copy_gb_per_s"] * 1e9, about["exp_g_per_s"] * 1e9 if "exp_g_per_s" in about else None)
    else:
        limits = measure_limits()
        about["copy_gb_per_s"] = round(limits.bytes_per_second / 1e9, 1)
        if limits.exponentials_per_second is not None:
            about["exp_g_per_s"] = round(limits.exponentials_per_second / 1e9, 1)
    print(*(f"{key}: {value}" for key, value in about.items()), "", sep="\n")
    columns = ("rival", "median ms", "25 %", "75 %", "GB/s", "/floor", "/native", "MB")
    print(f"{'case':32}", *(f"{column:>9}" for column in columns))
    measured = {row["case"] for row in rows}
    for case in args.case or (grid() if args.grid else NAMED):
        if str(case) in measured:
            continue
        for row in bench(case, names, limits, args.seconds):
            rows.append(row)
            figures = (f"{value:9.3f}" for key, value in row.items() if isinstance(value, float))
            print(f"{row['case']:32} {row['rival']:>9}", *figures, flush=True)
        if args.json:
            # After every case, so that a run that was stopped can be resumed.
            write_atomically(args.json, json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")

    if args.picture:
        draw(rows, about, args.picture)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*about, *rows[0]])
            writer.writeheader()
            writer.writerows({**about, **row} for row in rows)


if __name__ == "__main__":
    main()
