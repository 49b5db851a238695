"""Batches of language models."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_tokenizer
from tiny_tokens import make_rows, tokenizer

from amtss_fast.data import LanguageModelCollator


def test_masks_depend_on_seed_epoch_and_row_alone() -> None:
    tok, rows = tokenizer(), list(make_rows(400))
    collate = LanguageModelCollator(tok, "masked-lm", seed=3)
    whole, parts = collate(rows), [collate(rows[i : i + 7]) for i in range(0, 400, 7)]
    for name in ("input_ids", "labels"):
        flat = [batch[name][batch["attention_mask"].bool()] for batch in parts]
        assert torch.equal(whole[name][whole["attention_mask"].bool()], torch.cat(flat))
    original = torch.nn.utils.rnn.pad_sequence([torch.tensor(r["input_ids"]) for r in rows], batch_first=True)
    picked = whole["labels"] >= 0
    special = torch.isin(original, torch.tensor(tok.all_special_ids))
    assert not (picked & special).any()
    assert torch.equal(whole["labels"][picked], original[picked])
    assert torch.equal(whole["input_ids"][~picked], original[~picked])
    n = int((~special).sum())
    assert abs(int(picked.sum()) / n - 0.15) < 4 * (0.15 * 0.85 / n) ** 0.5
    share = float((whole["input_ids"][picked] == tok.mask_token_id).float().mean())
    assert 0.7 < share < 0.9
    collate.epoch = 1
    assert not torch.equal(collate(rows)["labels"], whole["labels"])
    with pytest.raises(ValueError, match="task must be one of masked-lm, causal-lm; got 'x'"):
        LanguageModelCollator(tok, "x")
    with pytest.raises(ValueError, match=r"mask_probability must be in \(0, 1\), got 1"):
        LanguageModelCollator(tok, "masked-lm", mask_probability=1)
    with pytest.raises(ValueError, match="tokenizer with a mask token"):
        LanguageModelCollator(tiny_tokenizer(), "masked-lm")
