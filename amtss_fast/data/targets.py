"""Task names, and the targets of tasks that predict tokens.

A batch of such a task holds `input_ids`, `attention_mask` and `labels` [N, T] and `language_ids` [N]. A position counts
where its target is not -100.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from amtss_fast.loss.options import IGNORE_INDEX

LANGUAGE_MODELS = ("masked-lm", "causal-lm")
TOKEN_TASKS = (*LANGUAGE_MODELS, "token-classification")
TASKS = ("sequence-classification", *TOKEN_TASKS)


def token_targets(task: str, batch: Mapping[str, Any]) -> Tensor:
    """The target of each position [N, T] int64; -100 where a position does not count.

    `labels` belong to the tokens themselves, as in transformers. In a causal language model position t predicts token
    t + 1, so this function shifts the labels; no other function does. Padding (`attention_mask` 0) neither predicts nor
    is predicted.

    Raises:
        ValueError: labels whose shape is not that of `input_ids`.
    """
    labels: Tensor = batch["labels"]
    mask = batch.get("attention_mask")
    if labels.shape != batch["input_ids"].shape:
        raise ValueError(
            f"batch['labels'] must have the shape of input_ids {list(batch['input_ids'].shape)} for task {task!r}, got "
            f"{list(labels.shape)}"
        )
    if mask is not None:
        labels = labels.masked_fill(mask == 0, IGNORE_INDEX)
    if task != "causal-lm":
        return labels
    labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    return labels if mask is None else labels.masked_fill(mask == 0, IGNORE_INDEX)


@dataclass(frozen=True)
class Targets:
    """The n positions of a batch that count, sequence by sequence."""

    index: Tensor
    """[n] int64: places in the flattened batch [N * T]."""
    labels: Tensor
    """[n] int64."""
    rows: Tensor
    """[n] int64: the sequence of each position, 0 to N - 1."""
    language_ids: Tensor
    """[n] int64: the language of each position."""

    @classmethod
    def of(cls, task: str, batch: Mapping[str, Any]) -> Targets:
        """The positions of a batch that count in `task`; raises as :func:`token_targets`."""
        targets = token_targets(task, batch)
        index = (targets != IGNORE_INDEX).flatten().nonzero().squeeze(1)
        rows = index // targets.shape[1]
        return cls(index, targets.flatten()[index], rows, batch["language_ids"][rows])
