"""What a GPU says about the Triton kernels, in the order of importance, within a few minutes.

    python benchmarks/gpu_report.py --minutes 8 --json report.jsonl

It needs a checkout, and torch with Triton: the package need not be installed. Each result is printed and added to the
file as soon as it is there, one JSON object a line; the last one is the summary. First come correctness, equal bits of
repeated calls, of CUDA graphs and of two streams, then times: of loss and gradient beside plain torch, torch.compile,
Liger-Kernel and a copy of as many bytes, with rows read once and twice, then in other configurations. What the minutes
do not suffice for is named in the summary. The exit code is 1 if a result is wrong.

With TRITON_INTERPRET=1 and without a GPU, small cases show that the script works; their times mean nothing.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
if importlib.util.find_spec("amtss_fast") is None:
    sys.path.insert(0, str(ROOT))
import amtss_fast.loss.backends as backends  # noqa: E402

if importlib.util.find_spec("amtss_fast.loss.backends.triton") is None:
    # Where an installation puts it.
    backends.__path__.append(str(ROOT / "kernels"))
from cases import NAMED, TEMPERATURE, Case, captured, machine, plain, rivals, step, time_interleaved  # noqa: E402

from amtss_fast import amtss_loss  # noqa: E402
from amtss_fast.loss.backends.triton import config, launch, plan  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
Result = dict[str, Any]
# Runs of each comparison, at least.
LEAST = 5 if CUDA else 2

FEW = [Case(5, 2, 3), Case(3, 2, 301), Case(1, 1, 8201)]
CHECKED = [
    *(Case(n, 3, c, dtype) for dtype in (torch.float32, torch.bfloat16) for n, c in ((257, 3), (67, 1000), (33, 9001))),
    Case(5, 18, 250_002),
    Case(300, 3, 100),
    Case(9, 4, 4097, torch.float16),
]
TIMED = [
    *(Case(c.n, c.k, c.c, dtype) for dtype in (torch.float32, torch.bfloat16) for c in NAMED[3:6]),
    *(Case(4096, 3, c, dtype) for dtype in (torch.float32, torch.bfloat16) for c in (256, 1000, 4000)),
    Case(4096, 3, 3),
    Case(256, 1, 151_936, torch.bfloat16),
]
"""Long rows first: no GPU has read them once yet."""
DIVERGENCES = ["forward_kl", "jsd", "reverse_kl", "skew_forward_kl", "skew_reverse_kl", "tvd"]


def run_of(case: Case, **options: Any) -> Callable[[], tuple[Tensor, Tensor]]:
    """A step that returns loss and gradient."""
    student, teachers, labels = case.inputs(DEVICE)

    def run() -> tuple[Tensor, Tensor]:
        student.grad = None
        loss = amtss_loss(student, teachers, labels, temperature=TEMPERATURE, backend="triton", **options)
        loss.backward()
        assert student.grad is not None
        return loss.detach(), student.grad

    return run


def correctness(case: Case, divergence: str) -> Result:
    """Distances of loss and gradient from float64, beside those of plain torch in the type of the case."""
    student, teachers, labels = case.inputs(DEVICE)
    beta = 0.5 if divergence == "jsd" else 0.1 if divergence.startswith("skew") else None
    formula = functools.partial(plain, divergence=divergence, beta=0.5 if beta is None else beta)

    def gradient(loss_fn: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = student.detach().to(dtype).requires_grad_()
        loss = loss_fn(x, [t.to(dtype) for t in teachers], labels)
        loss.backward()
        assert x.grad is not None
        return loss.detach().double(), x.grad.double()

    options: Result = {"divergence": divergence} | ({} if beta is None else {"divergence_beta": beta})
    native = functools.partial(amtss_loss, temperature=TEMPERATURE, backend="triton", **options)
    exact = functools.partial(amtss_loss, temperature=TEMPERATURE, backend="reference", **options)
    want = gradient(exact, torch.float64)
    errors = {}
    for name, loss_fn in (("native", native), ("torch", formula)):
        got = gradient(loss_fn, case.dtype)
        errors[name] = [float((a - b).norm() / (b.norm() + 1e-30)) for a, b in zip(got, want, strict=True)]
    # Twice the error of torch, and the rounding of results that happen to be exact there.
    floor = torch.finfo(case.dtype).eps
    right = all(a <= 2 * b + floor for a, b in zip(errors["native"], errors["torch"], strict=True))
    return {"divergence": divergence, **{f"error_{name}": error for name, error in errors.items()}, "right": right}


def same_bits(case: Case, repeats: int) -> Result:
    """Whether repeated calls, replays of a CUDA graph, and calls on two streams at once give the same bits."""
    run = run_of(case)
    want = [x.clone() for x in run()]

    def same(got: tuple[Tensor, Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

    found = {"calls": all(same(run()) for _ in range(repeats))}
    if CUDA:
        held: list[tuple[Tensor, Tensor]] = []
        replay = captured(lambda: held.append(run()))
        right = True
        for _ in range(repeats):
            replay()
            right &= same(held[-1])
        found["graph"] = right
        other, right = run_of(case), True
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        torch.cuda.synchronize()
        for _ in range(max(1, repeats // 10)):
            both = []
            for stream, of in zip(streams, (run, other), strict=True):
                with torch.cuda.stream(stream):
                    both.append([x.clone() for x in of()])
            torch.cuda.synchronize()
            right &= all(same((loss, grad)) for loss, grad in both)
        found["streams"] = right
    return {**found, "right": all(found.values())}


def graph_of(run: Callable[[], object]) -> Callable[[], object]:
    """The kernels alone, where there are graphs."""
    if not CUDA:
        return run
    run()
    return captured(run)


def reads(twice: bool) -> Any:
    return mock.patch.dict(os.environ, AMTSS_TWO_READS="1" if twice else "")


def copy_of(n_bytes: int) -> Callable[[], object]:
    """Reads half of the bytes and writes the other half."""
    source = torch.empty(max(1, n_bytes // 2), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def speed(case: Case, seconds: float, divergence: str = "forward_kl") -> Iterator[Result]:
    """The kernels alone, beside a copy, in interleaved runs."""
    runs: dict[str, Callable[[], object]] = {"copy": graph_of(copy_of(case.bytes))}
    options: Result = {"divergence": divergence}
    for name, twice in (("one read", False), ("two reads", True)):
        with reads(twice):
            runs[name] = graph_of(run_of(case, **options))
    for name, timing in time_interleaved(runs, seconds, LEAST).items():
        yield {"way": name, "divergence": divergence, **timing.figures(), "gb_per_s": case.bytes / timing.median / 1e9}


def beside_others(case: Case, seconds: float) -> Iterator[Result]:
    """Whole steps beside others, with Python and the launches."""
    names = ["native", "torch", "compile"]
    if CUDA and case.k == 1 and importlib.util.find_spec("liger_kernel"):
        names.append("liger")
    inputs = case.inputs(DEVICE)
    losses = rivals(names)
    losses["native"] = functools.partial(amtss_loss, temperature=TEMPERATURE, backend="triton")

    def run(name: str) -> None:
        step(losses[name], *inputs)
        inputs[0].grad = None

    for name, timing in time_interleaved(
        {name: functools.partial(run, name) for name in names}, seconds, LEAST
    ).items():
        yield {"rival": name, **timing.figures()}


def bound_by_instructions(dtype: torch.dtype, seconds: float) -> Result:
    """Nanoseconds of a row of 1,000 classes where all logits stay in the second-level cache, and where none do.

    If both are equal, instructions bound the kernel, not memory.
    """
    rows = {"cache": 1024, "memory": 32768} if CUDA else {"cache": 1, "memory": 2}
    runs = {where: graph_of(run_of(Case(n, 3, 1000, dtype))) for where, n in rows.items()}
    timings = time_interleaved(runs, seconds, LEAST)
    return {"dtype": str(dtype)} | {f"ns_in_{where}": timings[where].median / n * 1e9 for where, n in rows.items()}


def host_time() -> Result:
    """Microseconds of the host for forward and backward of 32 rows; the device is far behind it."""
    run = run_of(Case(32, 3, 3))
    run()
    repeats = 200 if CUDA else 2
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return {"microseconds": (time.perf_counter() - begin) / repeats * 1e6}


def sweep(case: Case, seconds: float) -> Iterator[Result]:
    """One read in other configurations: threads and registers, and how far the steps are apart."""
    usual, configs = plan.choose_chunks, [(1024, 32, 168), (1024, 64, 144), (1024, 64, 96), (1024, 128, 64)]
    lag = plan.choose_lag
    ways = [(shape, 1.0) for shape in configs] + [(configs[0], factor) for factor in (0.25, 0.5, 2.0)]
    for shape, factor in ways if CUDA else ways[:1]:
        chosen = config.Config(1, *shape)
        with (
            mock.patch.object(plan, "choose_chunks", lambda d, chosen=chosen: usual(d)._replace(one_read=chosen)),
            mock.patch.object(plan, "choose_lag", lambda *a, factor=factor: max(1, round(lag(*a) * factor))),
            mock.patch.object(launch, "make_plan", plan.make_plan.__wrapped__),
        ):
            run = graph_of(run_of(case))
        timing = time_interleaved({"run": run}, seconds, LEAST)["run"]
        yield {"classes_threads_registers": shape, "lag_factor": factor, **timing.figures()}


def traffic(case: Case) -> Result:
    """Bytes of DRAM that a step of both ways moves, as Nsight Compute counts them, beside each byte once."""
    found: Result = {"bytes_once": case.bytes}
    dtype = str(case.dtype).removeprefix("torch.")
    for name, twice in (("one read", ""), ("two reads", "1")):
        command = ["ncu", "--metrics", "dram__bytes_read.sum,dram__bytes_write.sum", "--csv", "--print-units", "base"]
        command += [sys.executable, __file__, "--one-step", f"{case.n},{case.k},{case.c},{dtype}"]
        environment = os.environ | {"AMTSS_TWO_READS": twice}
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, env=environment, check=False)
        if done.returncode != 0:
            return {"refused": (done.stdout + done.stderr)[-300:]}
        lines = [line.split('","') for line in done.stdout.splitlines() if "dram__bytes" in line and "stream" in line]
        found[name] = sum(float(line[-1].strip('"').replace(",", "")) for line in lines)
    return found


def parts(seconds: float, repeats: int) -> Iterator[tuple[str, Case | None, Callable[[], Result | Iterator[Result]]]]:
    """Everything, in the order of importance."""
    for case in FEW:
        yield "smoke", case, functools.partial(correctness, case, "forward_kl")
    for case in CHECKED if CUDA else []:
        for divergence in ("forward_kl", "jsd"):
            yield "correctness", case, functools.partial(correctness, case, divergence)
    long = TIMED[1] if CUDA else FEW[-1]
    yield "bits", long, functools.partial(same_bits, long, repeats)
    for case in TIMED[:6] if CUDA else FEW[-1:]:
        yield "speed", case, functools.partial(speed, case, seconds)
    for dtype in (torch.bfloat16, torch.float32) if CUDA else (torch.float32,):
        yield "bound", None, functools.partial(bound_by_instructions, dtype, seconds)
    yield "sweep", long, functools.partial(sweep, long, seconds / 2)
    yield "host", None, host_time
    for case in TIMED[6:]:
        if CUDA:
            yield "speed", case, functools.partial(speed, case, seconds)
    if CUDA and shutil.which("ncu"):
        yield "traffic", long, functools.partial(traffic, long)
    for divergence in DIVERGENCES[1:] if CUDA else DIVERGENCES[1:2]:
        yield "divergence", long, functools.partial(correctness, long if CUDA else FEW[0], divergence)
        yield "speed", long, functools.partial(speed, long, seconds, divergence)
    for case in [TIMED[0], TIMED[-1], TIMED[-2], Case(32, 3, 3)] if CUDA else []:
        yield "others", case, functools.partial(beside_others, case, seconds)
    if CUDA:
        yield "repeats", long, functools.partial(same_bits, long, 50 * repeats)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="no part begins later (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2, help="of each comparison (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", default=Path("gpu_report.jsonl"))
    parser.add_argument("--one-step", metavar="N,K,C,DTYPE", help="only a step, for a profiler")
    args = parser.parse_args()
    if args.one_step:
        n, k, c, dtype = args.one_step.split(",")
        run_of(Case(int(n), int(k), int(c), getattr(torch, dtype)))()
        return 0
    begin = time.monotonic()
    counts = {"done": 0, "wrong": 0, "failed": 0}
    left_out: list[str] = []
    with args.json.open("a") as file:

        def write(result: Result) -> None:
            line = json.dumps(result)
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()

        write({"part": "machine", **machine()})
        for name, case, part in parts(args.seconds, 200 if CUDA else 2):
            label = name if case is None else f"{name} {case}"
            if time.monotonic() - begin > 60 * args.minutes:
                left_out.append(label)
                continue
            try:
                found = part()
                for result in [found] if isinstance(found, dict) else found:
                    write({"part": name, "case": str(case), **result})
                    counts["wrong"] += not result.get("right", True)
            except Exception as error:  # One part that fails must not cost the others.
                counts["failed"] += 1
                write({"part": name, "case": str(case), "error": f"{error!r}", "trace": traceback.format_exc()[-2000:]})
            counts["done"] += 1
        write({"part": "summary", **counts, "left_out": left_out, "seconds": time.monotonic() - begin})
    return 1 if counts["wrong"] or counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
