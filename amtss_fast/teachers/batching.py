"""Grouping and padding of the rows that a teacher's model is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from amtss_fast.models.layers import flush_left

MIN_ROWS = 8
"""The fewest rows of a forward pass; see `LENGTH_MULTIPLE`."""
LENGTH_MULTIPLE = 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8
"""Row lengths are padded to a multiple of this.

On one CPU thread a row's logits have the same bits in every batch of at least `MIN_ROWS` rows whose length is such a
multiple; in smaller batches matrix products and sums over positions take other code paths. Logits in a cache are then
equal to those of training with live teachers. Several threads divide a product by its size, which changes last bits.
"""


def batches_by_length(lengths: Sequence[int], size: int) -> list[np.ndarray]:
    """Places of rows sorted by length, shortest first, in parts of `size`, so that a batch needs little padding."""
    order = np.argsort(lengths, kind="stable")
    return [order[start : start + size] for start in range(0, len(order), size)]


@dataclass(frozen=True)
class Batching:
    """How one teacher's rows are grouped and padded.

    Args:
        multiple: lengths are padded to a multiple of this.
        least_saved: a further forward pass must save at least this many tokens of padding.
        max_length: the most tokens of a row. None: unknown, lengths stay as they are.
        pad_id: the token id of padding.
    """

    multiple: int
    least_saved: int
    max_length: int | None
    pad_id: int

    def run(self, forward: Callable[..., Any], inputs: dict[str, Any]) -> Tensor:
        """Logits [N, C] of a model's `forward`, rows in the order of `inputs`.

        On CPUs rows of similar length share a forward pass, because a padding token takes as long as any other. On
        other devices all rows go through at once.
        """
        mask = inputs.get("attention_mask")
        if mask is None or mask.device.type != "cpu":
            return self._forward(forward, inputs)
        lengths, order = mask.sum(1).sort(descending=True, stable=True)
        groups = group_rows(lengths.tolist(), self.least_saved)
        if len(groups) == 1:
            return self._forward(forward, inputs)
        parts = [self._forward(forward, _trimmed(inputs, order[group])) for group in groups]
        return torch.cat(parts)[order.argsort()]

    def _forward(self, forward: Callable[..., Any], inputs: dict[str, Any]) -> Tensor:
        logits: Tensor = forward(**self._padded(inputs), return_dict=True).logits
        return logits[: len(inputs["input_ids"])]

    def _padded(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """At least `MIN_ROWS` rows, by copies of the first, and a multiple of `multiple` tokens where that fits."""
        n, length = inputs["input_ids"].shape
        columns = -length % self.multiple
        if self.max_length is None or length + columns > self.max_length or "attention_mask" not in inputs:
            columns = 0
        copies = max(0, MIN_ROWS - n) if n else 0
        padded = {}
        for name, value in inputs.items():
            if isinstance(value, Tensor) and len(value) == n:
                if value.dim() == 2 and value.shape[1] == length:
                    value = F.pad(value, (0, columns), value=self.pad_id if name == "input_ids" else 0)
                value = torch.cat([value, value[:1].expand(copies, *value.shape[1:])])
            padded[name] = value
        return padded


def padded_right(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of a model with the padding of each row on the right; models count positions from the first column."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2 or not len(mask):
        return inputs
    like = [name for name, value in inputs.items() if isinstance(value, Tensor) and value.shape == mask.shape]
    moved = flush_left(mask, *(inputs[name] for name in like))
    return {**inputs, **dict(zip(like, moved[1:], strict=True))}


def group_rows(lengths: Sequence[int], least_saved: int) -> list[slice]:
    """Groups of rows sorted from long to short.

    A group ends where at least `MIN_ROWS` rows follow that are a quarter shorter than its first row, if that saves at
    least `least_saved` tokens of padding. A group has at least `MIN_ROWS` rows.
    """
    groups, start = [], 0
    for row in range(MIN_ROWS, len(lengths) - MIN_ROWS + 1):
        saved = (len(lengths) - row) * (lengths[start] - lengths[row])
        if row - start >= MIN_ROWS and lengths[row] <= 0.75 * lengths[start] and saved >= least_saved:
            groups.append(slice(start, row))
            start = row
    return [*groups, slice(start, len(lengths))]


def _trimmed(inputs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """The inputs of some rows, without the columns at their end that only longer rows use."""
    n, length = inputs["input_ids"].shape
    part = {
        name: value[rows] if isinstance(value, Tensor) and len(value) == n else value for name, value in inputs.items()
    }
    used = part["attention_mask"].any(0).nonzero().squeeze(1)
    # Columns at the start stay: a model may count positions from the first one.
    columns = slice(int(used[-1]) + 1 if len(used) else 1)
    return {
        name: value[:, columns] if isinstance(value, Tensor) and value.shape[1:] == (length,) else value
        for name, value in part.items()
    }
