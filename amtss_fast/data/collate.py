"""Batches from encoded rows."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from amtss_fast.data.targets import LANGUAGE_MODELS
from amtss_fast.errors import UserError
from amtss_fast.loss.options import IGNORE_INDEX


class DistillationCollator:
    """Pads encoded rows into a batch.

    The batch holds int64 tensors: `input_ids`, `attention_mask` (and `token_type_ids`) [N, T], `language_ids` [N] and
    `labels` [N]. Labels of tokens are [N, T] with -100 at the padding. With `keep_text` the batch also holds `text`
    (and `text_pair`), lists of N strings. T is the length of the longest row, rounded up to a multiple of
    `pad_to_multiple_of`.

    Args:
        tokenizer: pads.
        keep_text: adds the texts, for teachers with a tokenizer of their own.
        pad_to_multiple_of: of T; default 1.

    Raises:
        UserError: `keep_text` with rows that have no text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        keep_text: bool = False,
        pad_to_multiple_of: int | None = None,
    ) -> None:
        self.keep_text = keep_text
        self._pad = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=pad_to_multiple_of)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if self.keep_text and "text" not in rows[0]:
            raise UserError(
                f"keep_text=True needs the column 'text' in the rows, which have {list(rows[0])}; "
                "encode the data with keep_text=True"
            )
        texts = ("text", "text_pair")
        of_tokens = np.ndim(rows[0].get("labels", 0)) > 0
        left_out = (*texts, "labels") if of_tokens else texts
        ids = [{name: row[name] for name in row if name not in left_out} for row in rows]
        batch: dict[str, Any] = {name: value.to(torch.int64) for name, value in self._pad(ids).items()}
        if of_tokens:
            labels = torch.full(batch["input_ids"].shape, IGNORE_INDEX)
            labels[batch["attention_mask"].bool()] = torch.cat([torch.as_tensor(row["labels"]) for row in rows])
            batch["labels"] = labels
        if self.keep_text:
            batch.update({name: [row[name] for row in rows] for name in texts if name in rows[0]})
        return batch


class LanguageModelCollator:
    """Pads encoded rows (:func:`amtss_fast.data.encode`) into a batch of a language model.

    `labels` [N, T] int64 are the token ids; for a masked model only those of the chosen tokens, -100 elsewhere. Each
    token that is not special is chosen with `mask_probability`. Of the chosen tokens 8 in 10 are masked, one in 10 is
    replaced by a random token, and one in 10 is left as it is. The choice depends on seed, epoch and row alone: neither
    the size of batches nor a resume changes it.

    Args:
        tokenizer: pads, and gives the mask token.
        task: `"masked-lm"` or `"causal-lm"`.
        mask_probability: in (0, 1).
        seed: of the choice.

    Raises:
        ValueError: another task, or a probability outside (0, 1).
        UserError: a masked model's tokenizer without a mask token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, task: str, *, mask_probability: float = 0.15, seed: int = 0
    ) -> None:
        if task not in LANGUAGE_MODELS:
            raise ValueError(f"task must be one of {', '.join(LANGUAGE_MODELS)}; got {task!r}")
        if not 0 < mask_probability < 1:
            raise ValueError(f"mask_probability must be in (0, 1), got {mask_probability}")
        if task == "masked-lm" and tokenizer.mask_token_id is None:
            raise UserError("a masked language model needs a tokenizer with a mask token, this one has none")
        self._pad = DistillationCollator(tokenizer)
        self._masks = task == "masked-lm"
        self._probability = mask_probability
        self._seed = seed
        self._mask_id = int(tokenizer.mask_token_id) if self._masks else -1
        self._special = np.array(tokenizer.all_special_ids)
        self._n_tokens = len(tokenizer)
        self.epoch = 0

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        ids = [np.asarray(row["input_ids"], dtype=np.int64) for row in rows]
        inputs, labels = zip(*map(self._mask, ids), strict=True) if self._masks else (ids, ids)
        return self._pad([{**row, "input_ids": x, "labels": y} for row, x, y in zip(rows, inputs, labels, strict=True)])

    def _mask(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The input ids of a row with its chosen tokens masked, and the row's labels."""
        rng = np.random.default_rng([self._seed, self.epoch, zlib.crc32(ids.tobytes())])
        chosen = (rng.random(len(ids)) < self._probability) & ~np.isin(ids, self._special)
        what = rng.random(len(ids))
        masked = np.where(chosen & (what < 0.8), self._mask_id, ids)
        masked = np.where(chosen & (what >= 0.9), rng.integers(self._n_tokens, size=len(ids)), masked)
        return masked, np.where(chosen, ids, IGNORE_INDEX)
