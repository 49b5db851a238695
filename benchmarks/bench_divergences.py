"""Forward + backward of each divergence, beside the forward KL and beside torch.compile of its own formula.

    python benchmarks/bench_divergences.py                    all divergences, K = 1 and 4, C from 3 to 250,002
    python benchmarks/bench_divergences.py --compiled         each beside torch.compile, C = 5,000 and 32,000
    python benchmarks/bench_divergences.py --case 1024,4,5000 --divergences jsd,tvd --seconds 5 --json FILE

Every case first checks that loss and gradient are those of the plain formula. Times are medians of interleaved runs
with their quartiles; a run is forward, backward and the release of the gradient.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from bench_loss import parse_case
from cases import TEMPERATURE, Case, Loss, default_device, distance, machine, plain, record, step, time_interleaved
from torch import Tensor

from amtss_fast import amtss_loss
from amtss_fast.loss.options import DIVERGENCES, LossKeywords

Row = dict[str, str | int | float]

BETAS = {"jsd": 0.5, "skew_forward_kl": 0.1, "skew_reverse_kl": 0.1}
CASES = [
    Case(max(4, min(4096, 4_000_000 // (c * (k + 1)))), k, c)
    for c in (3, 33, 100, 1000, 5000, 32_000, 250_002)
    for k in (1, 4)
]
COMPILED = [Case(512, 1, 5000), Case(512, 4, 5000), Case(128, 1, 32_000), Case(128, 4, 32_000)]


def native(divergence: str) -> Loss:
    options = LossKeywords(divergence=divergence, temperature=TEMPERATURE)  # type: ignore[typeddict-item]
    if divergence in BETAS:
        options["divergence_beta"] = BETAS[divergence]
    return functools.partial(amtss_loss, backend="triton" if torch.cuda.is_available() else "cpu", **options)


def formula(divergence: str) -> Loss:
    return functools.partial(plain, divergence=divergence, beta=BETAS.get(divergence, 0.5))


def check(divergence: str, losses: dict[str, Loss], case: Case) -> None:
    """AssertionError unless all give the same loss, and a gradient that rounding alone makes another."""
    # Where p and q are almost equal, rounding decides the sign of the total variation's gradient.
    bound = 1e-2 if divergence == "tvd" else 1e-4 if case.dtype == torch.float32 else 2e-2
    inputs = case.inputs(default_device())
    want: list[Tensor] = []
    for name, loss_fn in losses.items():
        loss = step(loss_fn, *inputs)
        assert inputs[0].grad is not None
        got = [loss, inputs[0].grad.float()]
        found = [distance(a, b) for a, b in zip(got, want or got, strict=True)]
        if not max(found) <= bound:
            raise AssertionError(f"{name}: loss and gradient are {found} away from those of {next(iter(losses))}")
        want = want or got


def measure(losses: dict[str, Loss], case: Case, seconds: float) -> list[Row]:
    student, teachers, labels = case.inputs(default_device())

    def run(loss_fn: Loss) -> None:
        step(loss_fn, student, teachers, labels)
        student.grad = None

    runs: dict[str, Callable[[], object]] = {name: functools.partial(run, f) for name, f in losses.items()}
    timings = time_interleaved(runs, seconds)
    first = next(iter(timings.values())).median
    return [
        {"case": str(case), "rival": name, **timing.figures(), "times_first": timing.median / first}
        for name, timing in timings.items()
    ]


def beside_the_forward_kl(case: Case, divergences: list[str], seconds: float) -> list[Row]:
    losses = {name: native(name) for name in dict.fromkeys(["forward_kl", *divergences])}
    for name, loss_fn in losses.items():
        check(name, {name: loss_fn, "torch": formula(name)}, case)
    return measure(losses, case, seconds)


def beside_torch_compile(case: Case, divergences: list[str], seconds: float) -> list[Row]:
    rows = []
    for name in divergences:
        torch._dynamo.reset()
        losses = {name: native(name), "compile": torch.compile(formula(name), dynamic=False)}
        check(name, losses, case)
        for row in measure(losses, case, seconds):
            rows.append(row | {"rival": name if row["rival"] == name else f"{name}, torch.compile"})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=parse_case, action="append", metavar="N,K,C[,DTYPE]")
    parser.add_argument("--compiled", action="store_true", help="beside torch.compile of each formula")
    parser.add_argument("--divergences", default=",".join(DIVERGENCES), help="comma-separated (default: all)")
    parser.add_argument("--seconds", type=float, default=6, help="for each comparison (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="cases already in it are replaced, others kept")
    args = parser.parse_args()
    divergences = args.divergences.split(",")
    if unknown := set(divergences) - set(DIVERGENCES):
        parser.error(f"--divergences must be among {', '.join(DIVERGENCES)}, got {', '.join(sorted(unknown))}")

    print(*(f"{key}: {value}" for key, value in machine().items()), sep="\n")
    columns = ("median ms", "25 %", "75 %", "/first")
    print(f"\n{'case':32} {'rival':>30}", *(f"{column:>9}" for column in columns))
    for case in args.case or (COMPILED if args.compiled else CASES):
        compare = beside_torch_compile if args.compiled else beside_the_forward_kl
        measured = compare(case, divergences, args.seconds)
        for row in measured:
            figures = (f"{value:9.3f}" for value in row.values() if isinstance(value, float))
            print(f"{row['case']:32} {row['rival']:>30}", *figures, flush=True)
        record(args.json, measured, "compiled" if args.compiled else "rows")


if __name__ == "__main__":
    main()
