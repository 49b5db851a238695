"""Which positions of a batch count, and what they predict."""

from __future__ import annotations

import pytest
import torch

from amtss_fast.data import Targets, token_targets


def test_targets() -> None:
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 0], [0, 8, 9, 4]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]),
        "labels": torch.tensor([[5, 6, -100, 0], [0, 8, 9, 4]]),
    }
    assert token_targets("masked-lm", batch).tolist() == [[5, 6, -100, -100], [-100, 8, 9, 4]]
    # Position t predicts t + 1: never padding, never the first token, never from padding.
    assert token_targets("causal-lm", batch).tolist() == [[6, -100, -100, -100], [-100, 9, 4, -100]]
    with pytest.raises(ValueError, match=r"must have the shape of input_ids \[2, 4\] for task 'masked-lm', got \[2\]"):
        token_targets("masked-lm", batch | {"labels": torch.zeros(2)})


def test_positions_that_count() -> None:
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 0], [8, 9, 4, 3]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
        "labels": torch.tensor([[-100, -1, 7, 2], [8, -100, -100, 3]]),
        "language_ids": torch.tensor([2, 0]),
    }
    targets = Targets.of("masked-lm", batch)
    assert targets.index.tolist() == [1, 2, 4, 7]
    # -1, without a label, counts.
    assert targets.labels.tolist() == [-1, 7, 8, 3]
    assert targets.rows.tolist() == [0, 0, 1, 1]
    assert targets.language_ids.tolist() == [2, 2, 0, 0]
