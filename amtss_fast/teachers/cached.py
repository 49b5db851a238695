"""Teachers whose logits are read from a cache, and the logits that fill it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from torch import Tensor

from amtss_fast.loss.logits import QuantizedLogits
from amtss_fast.models.heads import OutputHead
from amtss_fast.teachers.batching import batches_by_length
from amtss_fast.teachers.cache import CachedLogits
from amtss_fast.teachers.contract import Answers, Teachers, dense

ROW = "cache_row"
"""The column of encoded rows that holds the number of each row in the cache."""


class CachedTeachers:
    """Takes the place of a :class:`amtss_fast.TeacherPool` in training; no teacher is loaded.

    Args:
        logits: for each of K teachers its cached splits, in the same order for all. `cache_row` numbers the rows of the
            first split, then those of the next one.
        names, priors: of the teachers.
        teaches: [K, L] bool, teacher k teaches language l.
        label_names, languages: the student's, as for a pool.
    """

    task = "sequence-classification"
    heads: Sequence[OutputHead] = ()
    needs_text = False

    def __init__(
        self,
        logits: Sequence[Sequence[CachedLogits]],
        *,
        names: Sequence[str],
        priors: Sequence[float],
        teaches: Tensor,
        label_names: Sequence[str],
        languages: Sequence[str],
    ) -> None:
        self._logits = logits
        self.names = list(names)
        self.prior = torch.tensor(priors, dtype=torch.float32)
        self.teaches = teaches
        self.label_names = list(label_names)
        self.languages = list(languages)

    def __len__(self) -> int:
        return len(self.names)

    def number_rows(self, splits: DatasetDict) -> DatasetDict:
        """The encoded splits with the column `cache_row`; a split that is not cached stays as it is."""
        numbered, start = DatasetDict(splits), 0
        for part in self._logits[0]:
            numbers = np.arange(start, start + len(part))
            numbered[part.split] = numbered[part.split].add_column(ROW, numbers)
            start += len(part)
        return numbered

    def logits(self, batch: Mapping[str, Any]) -> tuple[list[Tensor | QuantizedLogits], Tensor]:
        """As :meth:`amtss_fast.TeacherPool.logits`, but K of [N, C] as they are stored, and read by `cache_row` [N].

        The rows of a batch belong to one split.

        Raises:
            ValueError: a batch without `cache_row`.
            IndexError: a row that the cache does not have.
        """
        rows, language_ids = batch.get(ROW), batch["language_ids"]
        if rows is None:
            raise ValueError(f"the batch has no {ROW!r}: training from cached logits needs rows made for it")
        device = language_ids.device
        mask = self.teaches.to(device)[:, language_ids]
        return [_read(parts, rows).to(device) for parts in self._logits], mask

    def ask(self, batch: Mapping[str, Any]) -> Callable[[], Answers]:
        """The answers of :meth:`logits`; the returned function reads them, and raises as :meth:`logits`."""
        return lambda: Answers(*self.logits(batch))


def pool_logits(
    pool: Teachers, encoded: Dataset, collate: Callable[[list[Any]], Mapping[str, Any]], batch_size: int
) -> Callable[[Sequence[int]], Tensor]:
    """The function that `CacheEntry.compute` calls: logits [n, C] float32 of one teacher for n rows of `encoded`.

    Args:
        pool: one teacher.
        encoded: the rows of a split.
        collate: makes a batch of rows.
        batch_size: rows of a forward pass.
    """

    def logits(rows: Sequence[int]) -> Tensor:
        part = encoded.select(rows)
        result = torch.zeros(len(part), len(pool.label_names or ()))
        for places in batches_by_length([len(ids) for ids in part["input_ids"]], batch_size):
            answers = pool.ask(collate([part[int(i)] for i in places]))()
            result[torch.from_numpy(places)] = dense(answers.outputs[0]).float().cpu()
        return result

    return logits


def _read(parts: Sequence[CachedLogits], rows: Tensor) -> Tensor | QuantizedLogits:
    start = 0
    for part in parts:
        if len(rows) == 0 or int(rows[0]) < start + len(part):
            return part.read(rows - start)
        start += len(part)
    raise IndexError(f"cached rows are 0 to {start - 1}, got {int(rows[0])}")
