"""Training under a memory budget: what to give up, in which order, found by trying it on the longest rows.

What is tried is what runs: a forward and a backward pass of the real models at a micro-batch, with the peak of the
whole process (CPU) or of the device's allocator as the kernel or CUDA reports it. Micro-batches grow as long as the
next one is expected to fit, so that trying does not break the budget either.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from pydantic import NonNegativeInt, PositiveInt

from amtss_fast._system.memory import available, used

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
# The share of the budget that a plan may use; the rest is for what is not predicted, such as fragmentation.
_FILL = 0.92
# The share of the free memory that the budget "auto" takes.
_AUTO = 0.9
# With fewer rows, matrix products get slow and recomputing activations costs less.
_SMALL = 8
AS_CONFIGURED = "as configured"
"""The precision of teachers that are loaded as the configuration says."""


def parse_budget(budget: str | float, device: torch.device) -> int:
    """Bytes of `"6GB"`, `"800MB"`, `"2GiB"`, a number of bytes, or `"auto"`: nine tenths of what is free now, on top of
    what this process has already.

    Raises:
        ValueError: anything else, or not above 0.
    """
    if budget == "auto":
        return int(_AUTO * (available(device) + used(device)))
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?)?B?\s*", str(budget), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise ValueError(f"memory.budget must be a size such as 6GB, 800MB or 2GiB, or auto; got {budget!r}")
    return int(float(match[1]) * _UNITS[(match[2] or "").upper()])


class Loading(NamedTuple):
    """How the teachers are loaded."""

    precision: str = AS_CONFIGURED
    """`as configured`, `bfloat16` or `int8`."""
    resident: int | None = None
    """How many of them are on the device at a time; None: as configured."""

    def __str__(self) -> str:
        return self.precision if self.resident is None else f"{self.precision}, {self.resident} at a time on the device"


@dataclass(frozen=True)
class MemoryPlan:
    """What a training runs with, and the peak that it is expected to reach."""

    precision: str
    resident: PositiveInt | None
    """Both of the teachers, see :class:`Loading`."""
    approximate: bool
    """Whether that is less than the configuration asks for: another loss, by the teachers' rounding."""
    micro_batch: PositiveInt
    accumulation: PositiveInt
    checkpointing: bool
    chunk_rows: PositiveInt | None
    budget: PositiveInt
    expected: NonNegativeInt
    """Bytes."""
    measured: NonNegativeInt | None = None
    """The peak of the training, in bytes, once it is over."""

    def describe(self) -> str:
        """One line for the user."""
        parts = [
            f"teachers {Loading(self.precision, self.resident)}" + (" (approximate)" if self.approximate else ""),
            f"micro-batch {self.micro_batch} x {self.accumulation}",
            f"gradient checkpointing {'on' if self.checkpointing else 'off'}",
        ]
        if self.chunk_rows is not None:
            parts.append(f"chunks of {self.chunk_rows} tokens")
        return (
            f"Memory: budget {self.budget / 1e9:.2f} GB, expected peak {self.expected / 1e9:.2f} GB: {', '.join(parts)}"
        )


def make_plan(
    budget: int,
    batch_size: int,
    accumulation: int,
    loadings: Sequence[Loading],
    teachers: Callable[[Loading], AbstractContextManager[Callable[[int, bool, int], int]]],
    chunk_rows: int | None = None,
) -> MemoryPlan:
    """The first plan that fits, of those that change the least.

    In this order: the whole batch at once; micro-batches, down to 8 rows; gradient checkpointing; smaller
    micro-batches; then the same with the next way to load the teachers, approximate where its precision is another than
    the first one's.

    Args:
        budget: bytes.
        batch_size: rows of a micro-batch as configured, `accumulation` of them in a step; their product is kept.
        loadings: of the teachers, the configured one first.
        teachers: loads them and gives the peak in bytes of a step at (micro-batch, checkpointing,
            accumulation); raises MemoryError where they alone are too large.
        chunk_rows: what the plan says about it.

    Raises:
        ValueError: nothing fits; the message names the least that was seen.
    """
    limit = int(_FILL * budget)
    least: list[int] = []
    for loading in loadings:
        try:
            with teachers(loading) as peak:
                found = _largest(peak, batch_size, accumulation, limit, least)
        except MemoryError:
            continue
        if found is not None:
            micro_batch, checkpointing, expected = found
            return MemoryPlan(
                *loading,
                loading.precision != loadings[0].precision,
                micro_batch,
                accumulation * (batch_size // micro_batch),
                checkpointing,
                chunk_rows,
                budget,
                expected,
            )
    needed = f"; the least that was tried needs {min(least) / _FILL / 1e9:.2f} GB" if least else ""
    raise ValueError(
        f"memory.budget = {budget / 1e9:.2f} GB is too small for these models with teachers in "
        f"{' or '.join(map(str, loadings))}{needed}"
    )


def _largest(
    peak: Callable[[int, bool, int], int], batch_size: int, accumulation: int, limit: int, least: list[int]
) -> tuple[int, bool, int] | None:
    """Micro-batch, checkpointing and peak of the best that fits."""
    best: tuple[int, bool, int] | None = None
    for checkpointing in (False, True):
        seen: list[tuple[int, int]] = []
        for micro_batch in _sizes(batch_size):
            if seen and _expected(seen, micro_batch) > limit:
                break
            bytes_ = peak(micro_batch, checkpointing, accumulation * (batch_size // micro_batch))
            least.append(bytes_)
            if bytes_ > limit:
                break
            seen.append((micro_batch, bytes_))
        if seen and (best is None or seen[-1][0] > best[0]):
            best = seen[-1][0], checkpointing, seen[-1][1]
        if best is not None and best[0] >= min(_SMALL, batch_size):
            break
    return best


def _sizes(batch_size: int) -> Iterator[int]:
    """Divisors of the batch, each about twice the one before."""
    last = 0
    for size in range(1, batch_size + 1):
        if batch_size % size == 0 and (size >= 2 * last or size == batch_size):
            last = size
            yield size


def _expected(seen: Sequence[tuple[int, int]], micro_batch: int) -> float:
    """The peak at a larger micro-batch, on the line through the last two."""
    if len(seen) < 2:
        return seen[-1][1]
    (small, low), (large, high) = seen[-2:]
    return high + max(0, high - low) / (large - small) * (micro_batch - large)
