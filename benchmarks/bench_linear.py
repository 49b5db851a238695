"""Forward + backward of the loss through its heads, from hidden states, on the GPU or else the CPU.

    python benchmarks/bench_linear.py                            the named cases of the device
    python benchmarks/bench_linear.py --case 384,320,3,90007     N rows, width H, K teachers, C classes, and a dtype
    python benchmarks/bench_linear.py --rivals native,products --case 2048,384,3,250002
    python benchmarks/bench_linear.py --divergence jsd --rivals native,liger-compile,trl --case 2048,384,1,151936
    python benchmarks/bench_linear.py --json FILE

The rivals: `native` is `linear_amtss_loss`; `torch` and `compile` make all logits, then the same formula; `liger` and
`liger-compile` are Liger-Kernel's chunked JSD, with beta = 0 for the forward KL, and `trl` is TRL's chunked divergence
(one teacher, chunks of their default sizes), where they are installed and K = 1. `products` is no rival but what nobody
can leave out: K + 1 products for the logits and two for the gradients, as torch does them at once. Every case first
checks that the rivals agree; those of half precision with what the same inputs give in float32, from which `head error`
tells how far the gradient of the student's head is (norm of the difference by norm). Times are medians of interleaved
runs with their quartiles. Memory is the peak beyond inputs and gradients.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from cases import TEMPERATURE, default_device, distance, machine, peak_memory, plain, record, time_interleaved
from torch import Tensor

from amtss_fast import linear_amtss_loss
from amtss_fast.loss.options import Divergence

Row = dict[str, str | int | float]


@dataclass(frozen=True)
class LinearCase:
    """N rows of width H, K teachers of the same width, C classes."""

    n: int
    h: int
    k: int
    c: int
    dtype: torch.dtype = torch.float32

    def inputs(self, device: str) -> Inputs:
        g = torch.Generator(device).manual_seed(0)

        def matrix(rows: int, spread: float) -> Tensor:
            return torch.randn(rows, self.h, generator=g, device=device).mul_(spread).to(self.dtype)

        # Logits of standard deviation 2.
        spread = 2 / self.h**0.5
        return Inputs(
            matrix(self.n, 1).requires_grad_(),
            matrix(self.c, spread).requires_grad_(),
            [matrix(self.n, 1) for _ in range(self.k)],
            [matrix(self.c, spread) for _ in range(self.k)],
            torch.randint(self.c, (self.n,), generator=g, device=device),
        )

    @property
    def flops(self) -> int:
        """K + 1 products for the logits, two for the gradients."""
        return 2 * self.n * self.h * self.c * (self.k + 3)

    def __str__(self) -> str:
        # Without the dtype where it is the usual one.
        dtype = "" if self.dtype == torch.float32 else f" {str(self.dtype).removeprefix('torch.')}"
        return f"N={self.n} H={self.h} K={self.k} C={self.c}{dtype}"


@dataclass
class Inputs:
    hidden: Tensor  # [N, H]
    weight: Tensor  # [C, H]
    teacher_hidden: list[Tensor]
    teacher_weight: list[Tensor]
    labels: Tensor  # [N]

    def step(self, loss_fn: Loss) -> Tensor:
        """Forward and backward, with fresh gradients."""
        self.hidden.grad = self.weight.grad = None
        loss = loss_fn(self)
        loss.backward()
        return loss.detach()


Loss = Callable[[Inputs], Tensor]


DIVERGENCES: tuple[Divergence, ...] = ("forward_kl", "jsd")


def native(divergence: Divergence) -> Loss:
    def loss_fn(x: Inputs) -> Tensor:
        loss: Tensor = linear_amtss_loss(
            x.hidden,
            x.weight,
            x.teacher_hidden,
            x.teacher_weight,
            x.labels,
            temperature=TEMPERATURE,
            divergence=divergence,
        )
        return loss

    return loss_fn


def _from_logits(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: list[Tensor],
    teacher_weight: list[Tensor],
    labels: Tensor,
    divergence: Divergence,
) -> Tensor:
    with torch.no_grad():
        teachers = [F.linear(h, w) for h, w in zip(teacher_hidden, teacher_weight, strict=True)]
    return plain(F.linear(hidden, weight), teachers, labels, divergence)


def peer_beta(divergence: Divergence) -> float:
    """What Liger and TRL call `beta`: 0 is the forward KL."""
    return 0.5 if divergence == "jsd" else 0.0


def liger(compiled: bool, divergence: Divergence) -> Loss:
    """Without the cross entropy, which it leaves out at weight 0, and with the factor of a temperature."""
    jsd = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=TEMPERATURE**2,
        beta=peer_beta(divergence),
        temperature=TEMPERATURE,
        compiled=compiled,
    )

    def loss_fn(x: Inputs) -> Tensor:
        (teacher_hidden,), (teacher_weight,) = x.teacher_hidden, x.teacher_weight
        loss: Tensor = jsd(x.hidden, x.weight, teacher_hidden, teacher_weight, x.labels)
        return loss

    return loss_fn


def trl(divergence: Divergence) -> Loss:
    chunked = importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction

    def loss_fn(x: Inputs) -> Tensor:
        (teacher_hidden,), (teacher_weight,) = x.teacher_hidden, x.teacher_weight
        beta = peer_beta(divergence)
        rows, _ = chunked.apply(x.hidden, x.weight, None, teacher_hidden, teacher_weight, None, beta, TEMPERATURE)
        loss: Tensor = TEMPERATURE**2 * rows.mean()
        return loss

    return loss_fn


def rivals(case: LinearCase, names: list[str], divergence: Divergence) -> dict[str, Loss]:
    torch._dynamo.reset()
    formula = functools.partial(_from_logits, divergence=divergence)
    compiled = torch.compile(formula, dynamic=False)

    def of(function: Callable[..., Tensor]) -> Loss:
        return lambda x: function(x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, x.labels)

    losses: dict[str, Callable[[], Loss]] = {
        "native": lambda: native(divergence),
        "torch": lambda: of(formula),
        "compile": lambda: of(compiled),
        "liger": lambda: liger(False, divergence),
        "liger-compile": lambda: liger(True, divergence),
        "trl": lambda: trl(divergence),
    }
    packages = {"liger": "liger_kernel", "liger-compile": "liger_kernel", "trl": "trl"}

    def possible(name: str) -> bool:
        return name not in packages or (case.k == 1 and importlib.util.find_spec(packages[name]) is not None)

    return {name: losses[name]() for name in names if possible(name)}


def products(x: Inputs) -> None:
    with torch.no_grad():
        for hidden, weight in zip(x.teacher_hidden, x.teacher_weight, strict=True):
            F.linear(hidden, weight)
        logits = F.linear(x.hidden, x.weight)
        x.hidden.grad, x.weight.grad = logits @ x.weight, logits.t() @ x.hidden


def in_float32(inputs: Inputs, divergence: Divergence) -> list[Tensor]:
    """Loss and both gradients of plain torch with everything in float32, by parts of the rows that fit anywhere."""
    n_rows = len(inputs.hidden)
    hidden, weight = (x.detach().float().requires_grad_() for x in (inputs.hidden, inputs.weight))
    teacher_weight = [w.float() for w in inputs.teacher_weight]
    total = torch.zeros((), device=hidden.device)
    for rows in torch.arange(n_rows).split(256):
        begin, end = int(rows[0]), int(rows[-1]) + 1
        part = [h[begin:end].float() for h in inputs.teacher_hidden]
        loss = _from_logits(hidden[begin:end], weight, part, teacher_weight, inputs.labels[begin:end], divergence)
        loss = loss * (len(rows) / n_rows)
        loss.backward()
        total += loss.detach()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [total, hidden.grad, weight.grad]


def check_agreement(losses: dict[str, Loss], inputs: Inputs, divergence: Divergence) -> dict[str, float]:
    """Of half precision the distance of each rival's gradient of the head from that in float32. Warms them up, too.

    Raises:
        AssertionError: loss or a gradient is farther than rounding explains from that in float32, or else from that of
            the first rival.
    """
    half = inputs.hidden.dtype.itemsize < 4
    want = in_float32(inputs, divergence) if half else None
    bound = 5e-2 if half else 1e-4
    errors = {}
    for name, loss_fn in losses.items():
        loss = inputs.step(loss_fn)
        assert inputs.hidden.grad is not None
        assert inputs.weight.grad is not None
        got = [loss, inputs.hidden.grad, inputs.weight.grad]
        want = want or got
        found = [distance(x, y) for x, y in zip(got, want, strict=True)]
        if not max(found) <= bound:
            raise AssertionError(f"{name}: loss, gradients of hidden states and head are {found} away, not {bound}")
        if half:
            errors[name] = found[-1]
    return errors


def bench(case: LinearCase, names: list[str], divergence: Divergence, seconds: float, least: int) -> list[Row]:
    inputs = case.inputs(default_device())
    losses = rivals(case, [name for name in names if name != "products"], divergence)
    errors = check_agreement(losses, inputs, divergence)
    runs: dict[str, Callable[[], object]] = {
        name: lambda f=loss_fn: inputs.step(f)  # type: ignore[misc]
        for name, loss_fn in losses.items()
    }
    if "products" in names:
        runs["products"] = lambda: products(inputs)
    timings = time_interleaved(runs, seconds, least=least)
    rows: list[Row] = []
    for name, timing in timings.items():
        inputs.hidden.grad = inputs.weight.grad = None
        memory = peak_memory(runs[name]) - inputs.hidden.nbytes - inputs.weight.nbytes
        row: Row = {
            "case": str(case) if divergence == "forward_kl" else f"{case} {divergence}",
            "rival": name,
            **timing.figures(),
            "gflop_per_s": case.flops / timing.median / 1e9,
            "times_native": timing.median / timings["native"].median,
            "memory_mb": max(0, memory) / 1e6,
        }
        if name in errors:
            row["head_error"] = errors[name]
        rows.append(row)
    return rows


NAMED = [
    LinearCase(384, 320, 3, 90_007),
    LinearCase(384, 320, 1, 90_007),
    LinearCase(64, 256, 3, 8000),
    LinearCase(2048, 256, 3, 8000),
    LinearCase(512, 768, 1, 32_000),
    LinearCase(128, 384, 1, 250_002),
]
# Where products of half precision are fast and memory is larger.
NAMED_ON_A_GPU = [
    LinearCase(2048, 768, 3, 250_002, torch.bfloat16),
    LinearCase(2048, 768, 1, 250_002, torch.bfloat16),
    LinearCase(8192, 2048, 1, 32_000, torch.bfloat16),
    LinearCase(4096, 4096, 1, 128_256, torch.bfloat16),
    LinearCase(2048, 768, 3, 250_002),
]


def parse_case(text: str) -> LinearCase:
    n, h, k, c, *dtype = text.split(",")
    return LinearCase(int(n), int(h), int(k), int(c), getattr(torch, dtype[0]) if dtype else torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", type=parse_case, action="append", metavar="N,H,K,C[,DTYPE]")
    parser.add_argument(
        "--rivals",
        default="native,torch,compile,liger,liger-compile,trl,products",
        help="comma-separated (default: %(default)s)",
    )
    parser.add_argument("--divergence", choices=DIVERGENCES, default="forward_kl")
    parser.add_argument("--seconds", type=float, default=20, help="for each case (default: %(default)s)")
    parser.add_argument("--least", type=int, default=3, help="runs of each rival, 2 or more (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="cases already in it are replaced, others kept")
    args = parser.parse_args()
    names = args.rivals.split(",")
    if "native" not in names:
        parser.error("--rivals must name native: the others are compared with it")

    print(*(f"{key}: {value}" for key, value in machine().items()), sep="\n")
    columns = ("median ms", "25 %", "75 %", "GFLOP/s", "/native", "MB", "head err.")
    print(f"\n{'case':35} {'rival':>13}", *(f"{column:>9}" for column in columns))
    for case in args.case or (NAMED_ON_A_GPU if torch.cuda.is_available() else NAMED):
        measured = bench(case, names, args.divergence, args.seconds, args.least)
        for row in measured:
            figures = (f"{value:9.4g}" for key, value in row.items() if isinstance(value, float))
            print(f"{row['case']:35} {row['rival']:>13}", *figures, flush=True)
        # After every case, so that what a run that was stopped has measured is there.
        record(args.json, measured)


if __name__ == "__main__":
    main()
