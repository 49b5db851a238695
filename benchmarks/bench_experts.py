"""Teachers that list the top log-probabilities of an inference server, and experts that teach rows of their own.

    python benchmarks/bench_experts.py                     both
    python benchmarks/bench_experts.py --only lists --rows 256 --seconds 10 --json FILE

`lists`: one teacher lists the 64 likeliest of 151,936 classes, beside cross entropy alone on the same rows and beside
plain torch, which gathers the student's log-softmax and adds a class for the rest. Both must agree.
`routed`: ten teachers through heads of 32,000 classes, each for a tenth of the rows, beside one teacher for all rows.
Times are medians of interleaved runs of forward and backward; memory is the peak beyond inputs and gradients.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from cases import default_device, distance, machine, peak_memory, record, time_interleaved
from torch import Tensor

from amtss_fast import TopKLogprobs, amtss_loss, linear_amtss_loss

Row = dict[str, str | int | float]
Step = Callable[[], Tensor]


def listed_loss(student: Tensor, top: TopKLogprobs) -> Tensor:
    """The forward KL over the listed classes and the rest as one more."""
    log_q = student.log_softmax(-1).gather(-1, top.indices)
    rest_p, rest_q = (torch.log1p(-log.exp().sum(-1)) for log in (top.logprobs, log_q))
    listed = (top.logprobs.exp() * (top.logprobs - log_q)).sum(-1)
    return (listed + rest_p.exp() * (rest_p - rest_q)).mean()


def lists(n_rows: int, n_classes: int = 151_936, k: int = 64) -> tuple[dict[str, Step], list[Tensor]]:
    device = default_device()
    g = torch.Generator(device).manual_seed(0)
    student = torch.randn(n_rows, n_classes, generator=g, device=device).mul_(2)
    labels = torch.randint(n_classes, (n_rows,), generator=g, device=device)
    indices = torch.empty(n_rows, k, dtype=torch.int64, device=device)
    logprobs = torch.empty(n_rows, k, device=device)
    for row in range(n_rows):
        teacher = student[row] + torch.randn(n_classes, generator=g, device=device)
        logprobs[row], indices[row] = teacher.log_softmax(-1).topk(k)
    top = TopKLogprobs(indices, logprobs)
    student.requires_grad_()

    def step(loss_fn: Callable[[], Tensor]) -> Tensor:
        student.grad = None
        loss = loss_fn()
        loss.backward()
        return loss.detach()

    def native(**options: float) -> Tensor:
        loss: Tensor = amtss_loss(student, [top], labels, temperature=1.0, **options)  # type: ignore[arg-type]
        return loss

    both = {
        "top-k": functools.partial(step, native),
        "torch": functools.partial(step, lambda: listed_loss(student, top)),
    }
    results = []
    for run in both.values():
        loss = run()
        assert student.grad is not None
        results.append((loss, student.grad))
    found = [distance(a, b) for a, b in zip(*results, strict=True)]
    if max(found) > 1e-4:
        raise AssertionError(f"loss and gradient of plain torch are {found} away")
    # Without a teacher: kd_weight = 0.
    cross_entropy = functools.partial(native, kd_weight=0.0, ce_weight=1.0)
    return {"cross entropy": functools.partial(step, cross_entropy), **both}, [student]


def routed(
    n_rows: int, n_teachers: int = 10, n_classes: int = 32_000, width: int = 768
) -> tuple[dict[str, Step], list[Tensor]]:
    device = default_device()
    g = torch.Generator(device).manual_seed(0)

    def matrix(rows: int, spread: float) -> Tensor:
        return torch.randn(rows, width, generator=g, device=device).mul_(spread)

    hidden, weight = matrix(n_rows, 1).requires_grad_(), matrix(n_classes, 2 / width**0.5).requires_grad_()
    teacher_hidden = matrix(n_rows, 1)
    heads = [matrix(n_classes, 2 / width**0.5) for _ in range(n_teachers)]
    labels = torch.randint(n_classes, (n_rows,), generator=g, device=device)
    expert = torch.randint(n_teachers, (n_rows,), generator=g, device=device)
    rows = [(expert == k).nonzero().squeeze(1) for k in range(n_teachers)]
    own = [teacher_hidden[r] for r in rows]

    def step(teachers: list[Tensor], teacher_weight: list[Tensor], teacher_rows: list[Tensor] | None) -> Tensor:
        hidden.grad = weight.grad = None
        loss: Tensor = linear_amtss_loss(hidden, weight, teachers, teacher_weight, labels, teacher_rows=teacher_rows)
        loss.backward()
        return loss.detach()

    steps: dict[str, Step] = {
        "one teacher": functools.partial(step, [teacher_hidden], heads[:1], None),
        f"{n_teachers} routed": functools.partial(step, own, heads, rows),
    }
    check_routed(steps[f"{n_teachers} routed"](), hidden, weight, teacher_hidden, heads, rows)
    return steps, [hidden, weight]


def check_routed(
    loss: Tensor, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, heads: list[Tensor], rows: list[Tensor]
) -> None:
    """AssertionError unless the routed loss is the sum of what each expert's rows give by themselves."""
    alone = torch.zeros_like(loss)
    with torch.no_grad():
        for own, head in zip(rows, heads, strict=True):
            part = amtss_loss(hidden[own] @ weight.T, [teacher_hidden[own] @ head.T], reduction="sum")
            alone += part / len(hidden)
    torch.testing.assert_close(loss, alone, rtol=1e-4, atol=1e-5)


def bench(name: str, n_rows: int, seconds: float) -> list[Row]:
    steps, wanting = lists(n_rows) if name == "lists" else routed(n_rows)

    def run(step: Step) -> None:
        step()
        for tensor in wanting:
            tensor.grad = None

    timings = time_interleaved({label: functools.partial(run, step) for label, step in steps.items()}, seconds, least=3)
    first = next(iter(timings.values())).median
    rows: list[Row] = []
    for label, timing in timings.items():
        for tensor in wanting:
            tensor.grad = None
        gradients = sum(tensor.nbytes for tensor in wanting)
        memory = peak_memory(steps[label]) - gradients
        rows.append(
            {
                "case": f"{name} N={n_rows}",
                "rival": label,
                **timing.figures(),
                "times_first": timing.median / first,
                "memory_mb": memory / 1e6,
                "memory_of_gradient": memory / gradients,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["lists", "routed"])
    parser.add_argument("--rows", type=int, help="default: 1,024 with lists, 2,048 routed")
    parser.add_argument("--seconds", type=float, default=40, help="for each (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="cases already in it are replaced, others kept")
    args = parser.parse_args()
    print(*(f"{key}: {value}" for key, value in machine().items()), sep="\n")
    columns = ("median ms", "25 %", "75 %", "/first", "MB", "/gradient")
    print(f"\n{'case':20} {'rival':>14}", *(f"{column:>10}" for column in columns))
    for name, n_rows in (("lists", 1024), ("routed", 2048)):
        if args.only not in (None, name):
            continue
        measured = bench(name, args.rows or n_rows, args.seconds)
        for row in measured:
            figures = (f"{value:10.4g}" for value in row.values() if isinstance(value, float))
            print(f"{row['case']:20} {row['rival']:>14}", *figures, flush=True)
        record(args.json, measured)


if __name__ == "__main__":
    main()
