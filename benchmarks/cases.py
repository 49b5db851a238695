"""Cases, rivals and timing of the loss, for every benchmark of it."""

from __future__ import annotations

import ctypes
import datetime
import importlib
import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import amtss_fast
from amtss_fast import amtss_loss
from amtss_fast._system.files import write_atomically
from amtss_fast.loss.backends import cpu

TEMPERATURE = 2.0

Loss = Callable[[Tensor, Sequence[Tensor], Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """N rows, K teachers, C classes."""

    n: int
    k: int
    c: int
    dtype: torch.dtype = torch.float32

    def inputs(self, device: str = "cpu") -> tuple[Tensor, list[Tensor], Tensor]:
        """Student [N, C] that wants a gradient, K teachers [N, C], labels [N]."""
        g = torch.Generator(device).manual_seed(0)

        def logits() -> Tensor:
            return torch.randn(self.n, self.c, generator=g, device=device).mul_(2).to(self.dtype)

        student = logits().requires_grad_()
        teachers = [logits() for _ in range(self.k)]
        return student, teachers, torch.randint(self.c, (self.n,), generator=g, device=device)

    @property
    def bytes(self) -> int:
        """Each logit read once, each gradient written once."""
        return self.n * self.c * (self.k + 2) * self.dtype.itemsize

    @property
    def exponentials(self) -> int:
        """One for each logit."""
        return self.n * self.c * (self.k + 1)

    def __str__(self) -> str:
        return f"N={self.n} K={self.k} C={self.c} {str(self.dtype).removeprefix('torch.')}"


NAMED = [
    Case(32, 3, 3),
    Case(4096, 3, 3),
    Case(4096, 15, 3),
    Case(1024, 4, 5000),
    Case(512, 3, 32_000),
    Case(256, 3, 250_002),
    Case(1024, 4, 5000, torch.bfloat16),
    Case(512, 3, 32_000, torch.bfloat16),
]


def grid() -> list[Case]:
    """K and C over their range, at about four million logits."""
    return [
        Case(max(4, min(4096, 4_000_000 // (c * (k + 1)))), k, c)
        for c in (2, 3, 10, 32, 33, 100, 1000, 5000, 32_000, 250_002)
        for k in (1, 2, 4, 8, 16)
    ]


def native(student: Tensor, teachers: Sequence[Tensor], labels: Tensor) -> Tensor:
    """This library's kernel for the device."""
    backend = "triton" if student.is_cuda else "cpu"
    loss: Tensor = amtss_loss(student, teachers, labels, temperature=TEMPERATURE, backend=backend)
    return loss


def plain_divergence(log_p: Tensor, log_q: Tensor, divergence: str, beta: float) -> Tensor:
    """D(p, q) of each row as one would write it in torch, in its fast form: mixtures are of probabilities."""
    p, q = log_p.exp(), log_q.exp()

    def kl_to_mixture(log_a: Tensor, share: float) -> Tensor:
        return (log_a.exp() * (log_a - (share * p + (1 - share) * q).log())).sum(-1)

    if divergence == "forward_kl":
        return (p * (log_p - log_q)).sum(-1)
    if divergence == "reverse_kl":
        return (q * (log_q - log_p)).sum(-1)
    if divergence == "jsd":
        return beta * kl_to_mixture(log_p, beta) + (1 - beta) * kl_to_mixture(log_q, beta)
    if divergence == "skew_forward_kl":
        return kl_to_mixture(log_p, beta)
    if divergence == "skew_reverse_kl":
        return kl_to_mixture(log_q, 1 - beta)
    return 0.5 * (p - q).abs().sum(-1)


def plain(
    student: Tensor, teachers: Sequence[Tensor], labels: Tensor, divergence: str = "forward_kl", beta: float = 0.5
) -> Tensor:
    """The same formula as one would write it in torch."""
    log_q = (student.float() / TEMPERATURE).log_softmax(-1)
    label = labels.unsqueeze(-1)
    margins, divergences = [], []
    for teacher in teachers:
        log_p = (teacher.float() / TEMPERATURE).log_softmax(-1)
        p = log_p.exp()
        margins.append(p.gather(-1, label).squeeze(-1) - p.scatter(-1, label, -1.0).amax(-1))
        divergences.append(plain_divergence(log_p, log_q, divergence, beta))
    weights = torch.stack(margins).softmax(0)
    return TEMPERATURE**2 * (weights * torch.stack(divergences)).sum(0).mean()


def liger(student: Tensor, teachers: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Liger-Kernel's KL divergence: one teacher, of log-probabilities, on a GPU."""
    kl_div = importlib.import_module("liger_kernel.transformers").LigerKLDIVLoss(reduction="batchmean", log_target=True)
    (teacher,) = teachers
    log_q, log_p = ((x.float() / TEMPERATURE).log_softmax(-1) for x in (student, teacher))
    loss: Tensor = TEMPERATURE**2 * kl_div(log_q, log_p)
    return loss


def rivals(names: Sequence[str]) -> dict[str, Loss]:
    """The losses called `names`; each case compiles anew, as a user's fixed shapes would."""
    torch._dynamo.reset()
    losses: dict[str, Loss] = {
        "native": native,
        "torch": plain,
        "compile": torch.compile(plain, dynamic=False),
        "liger": liger,
    }
    return {name: losses[name] for name in names}


def step(loss_fn: Loss, student: Tensor, teachers: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Forward and backward, with a fresh gradient."""
    student.grad = None
    loss = loss_fn(student, teachers, labels)
    loss.backward()
    return loss.detach()


def distance(got: Tensor, want: Tensor) -> float:
    """Norm of the difference by norm."""
    return float((got.float() - want).norm() / want.norm())


def check_agreement(losses: dict[str, Loss], student: Tensor, teachers: Sequence[Tensor], labels: Tensor) -> None:
    """AssertionError unless all rivals give the same loss and gradient. Warms them up, too."""
    results = {}
    for name, loss_fn in losses.items():
        loss = step(loss_fn, student, teachers, labels)
        assert student.grad is not None
        results[name] = (loss, student.grad)
    first, *others = results
    rtol = 1e-4 if student.dtype == torch.float32 else 2e-2
    for other in others:
        torch.testing.assert_close(results[other][0], results[first][0], rtol=1e-4, atol=1e-6)
        scale = float(results[first][1].abs().max())
        torch.testing.assert_close(results[other][1], results[first][1], rtol=rtol, atol=rtol * scale)


@dataclass
class Timing:
    """Seconds of forward + backward."""

    median: float
    low: float
    """A quarter of the runs took no longer."""
    high: float
    """Three quarters of the runs took no longer."""
    runs: int

    def figures(self) -> dict[str, float | int]:
        """As the JSON files have it, in milliseconds."""
        return {
            "median_ms": self.median * 1e3,
            "low_ms": self.low * 1e3,
            "high_ms": self.high * 1e3,
            "runs": self.runs,
        }


def seconds_of(run: Callable[[], object], repeats: int) -> float:
    """Seconds of one run: by the clock, or between two events of the device where there is one."""
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - begin) / repeats
    begin_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin_event.record()
    for _ in range(repeats):
        run()
    end_event.record()
    end_event.synchronize()
    return float(begin_event.elapsed_time(end_event)) / 1e3 / repeats


def time_interleaved(runs: Mapping[str, Callable[[], object]], seconds: float, least: int = 5) -> dict[str, Timing]:
    """Round after round of one timing of each, for about `seconds` in all: a disturbance meets all rivals alike."""
    repeats = {}
    for name, run in runs.items():
        # One timing covers a millisecond at least.
        repeats[name] = max(1, int(1e-3 / seconds_of(run, 1)))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(samples.values()))) < least:
        for name, run in runs.items():
            samples[name].append(seconds_of(run, repeats[name]))
    timings = {}
    for name, values in samples.items():
        low, median, high = statistics.quantiles(values, n=4)
        timings[name] = Timing(median, low, high, len(values))
    return timings


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """`run` as a CUDA graph: its replays take the time of its kernels, without that of Python and of launching them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    replay: Callable[[], object] = graph.replay
    return replay


def default_device() -> str:
    """Where the benchmarks run."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def peak_memory(run: Callable[[], object]) -> int:
    """Bytes that `run` needs at its peak, beyond what is there before it (Linux, or the memory of a GPU)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - allocated
    # What malloc and the kernel keep of earlier runs would be used again and not be seen.
    ctypes.CDLL(None).malloc_trim(0)
    cpu.release_memory()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


@dataclass(frozen=True)
class Limits:
    """What this machine can do, measured."""

    bytes_per_second: float
    exponentials_per_second: float | None
    """None on a GPU, where memory alone sets the floor."""

    def floor(self, case: Case) -> float:
        """Seconds below which no implementation of `case` can get: memory or exponentials alone."""
        exponentials = case.exponentials / self.exponentials_per_second if self.exponentials_per_second else 0.0
        return max(case.bytes / self.bytes_per_second, exponentials)


def measure_limits() -> Limits:
    """Bandwidth of a copy that fits no cache, and the kernel's exponential in the first-level cache, on all threads.

    The best of several tries: a disturbance makes a limit look lower than it is. On a GPU the bandwidth alone.
    """
    threads = torch.get_num_threads()
    source = torch.zeros(64 << 20, device=default_device())
    target = torch.zeros_like(source)
    copies = [2 * source.nbytes / seconds_of(lambda: target.copy_(source), 1) for _ in range(9)]
    if source.is_cuda:
        return Limits(max(copies), None)
    from amtss_fast import _cpu

    x = [torch.rand(2048).neg_() for _ in range(threads)]
    y = [torch.empty(2048) for _ in range(threads)]
    repeats = 20_000

    def exponentials(i: int) -> None:
        _cpu.exp(x[i].data_ptr(), y[i].data_ptr(), 2048, repeats)

    rates = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            begin = time.perf_counter()
            list(pool.map(exponentials, range(threads)))
            rates.append(threads * 2048 * repeats / (time.perf_counter() - begin))
    return Limits(max(copies), max(rates))


def _cpu_name() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.processor()


def machine() -> dict[str, str | int | float]:
    """What a figure is worth nothing without."""
    gpu: dict[str, str | int | float] = {}
    if torch.cuda.is_available():
        import triton

        runtime = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
        gpu = {"gpu": torch.cuda.get_device_name(), "runtime": runtime, "triton": triton.__version__}
    return {
        **gpu,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "instruction_set": "none" if cpu.why_missing() else cpu.instruction_set(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "amtss_fast": amtss_fast.__version__,
        "system": platform.platform(),
    }


def record(path: Path | None, rows: Sequence[Mapping[str, object]], key: str = "rows") -> None:
    """Adds `rows`, with the date of each, to the results in a JSON file, in place of those of the same cases."""
    if path is None:
        return
    about = machine()
    results = json.loads(path.read_text()) if path.exists() else {}
    cases = {row["case"] for row in rows}
    kept = [row for row in results.get(key, []) if row["case"] not in cases]
    results |= {"machine": about, key: kept + [{**row, "date": about["date"]} for row in rows]}
    write_atomically(path, json.dumps(results, indent=1) + "\n")
