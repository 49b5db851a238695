"""The order of training rows: which language comes next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import Sampler

from amtss_fast.errors import UserError

LanguageSampling: TypeAlias = Literal["proportional", "balanced", "temperature", "adaptive"]
LANGUAGE_SAMPLINGS = ("proportional", "balanced", "temperature", "adaptive")


class LanguageSampler(Sampler[int]):
    """Draws a language for every row, then takes the next row of that language in its own shuffled order.

    With n_l rows of language l, it is drawn with a probability in proportion to ::

        n_l                "proportional"
        1                  "balanced", for languages that have rows
        n_l ** exponent    "temperature"; 0.3 is common for very unequal languages (XLM-R, arXiv 1911.02116)
        n_l r_l            "adaptive", with the language weights r of :class:`amtss_fast.AdaptiveStrategy`

    An epoch has as many rows as the data; rows of small languages come more than once. The order depends on seed and
    epoch alone, and for "adaptive" on the weights. These are read once per `chunk` rows and kept in `state_dict`, so
    that a resumed epoch draws the same rows.

    Args:
        language_ids: [N] integers, the language of each row.
        sampling: one of the four.
        seed: of the order.
        exponent: of "temperature", in [0, 1].
        weights: gives r, [L]; required for "adaptive", not allowed for the others.
        chunk: rows between two readings of the weights, at least 1.

    Raises:
        UserError: an unknown sampling, or an exponent outside [0, 1].
        ValueError: `weights` without "adaptive" or the reverse; a chunk below 1.
    """

    def __init__(
        self,
        language_ids: Sequence[int],
        sampling: LanguageSampling,
        *,
        seed: int,
        exponent: float = 0.3,
        weights: Callable[[], Tensor] | None = None,
        chunk: int = 1024,
    ) -> None:
        check_sampling(sampling, exponent)
        if (sampling == "adaptive") != (weights is not None):
            raise ValueError(f"weights belong to sampling='adaptive', got sampling={sampling!r}, weights={weights!r}")
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        ids = torch.as_tensor(language_ids, dtype=torch.long)
        self._rows = [(ids == language).nonzero().squeeze(1) for language in range(int(ids.max()) + 1)]
        counts = torch.tensor([len(rows) for rows in self._rows], dtype=torch.float64)
        power = {"balanced": 0.0, "temperature": exponent}.get(sampling, 1.0)
        self._base = torch.where(counts > 0, counts**power, 0.0)
        self._length, self._seed, self._weights, self._chunk = len(ids), seed, weights, chunk
        self._epoch = 0
        # The probabilities of each chunk of this epoch that was drawn so far.
        self._drawn: list[list[float]] = []

    def __len__(self) -> int:
        return self._length

    def set_epoch(self, epoch: int) -> None:
        """Selects the order of this epoch."""
        if epoch != self._epoch:
            self._epoch, self._drawn = epoch, []

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        queues: list[list[int]] = [[] for _ in self._rows]
        for chunk, start in enumerate(range(0, self._length, self._chunk)):
            count = min(self._chunk, self._length - start)
            languages = torch.multinomial(self._probabilities(chunk), count, replacement=True, generator=generator)
            for language in languages.tolist():
                if not queues[language]:
                    rows = self._rows[language]
                    queues[language] = rows[torch.randperm(len(rows), generator=generator)].tolist()
                yield queues[language].pop()

    def _probabilities(self, chunk: int) -> Tensor:
        if self._weights is None:
            return self._base / self._base.sum()
        if chunk == len(self._drawn):
            weighted = self._base * self._weights().double().cpu()[: len(self._base)]
            self._drawn.append((weighted / weighted.sum()).tolist())
        return torch.tensor(self._drawn[chunk], dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        """The epoch and the probabilities of its chunks, as plain numbers."""
        return {"epoch": self._epoch, "drawn": [list(p) for p in self._drawn]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a :meth:`state_dict`."""
        self._epoch, self._drawn = state["epoch"], [list(p) for p in state["drawn"]]


def check_sampling(sampling: str, exponent: float) -> None:
    """Raises UserError for an unknown sampling or an exponent outside [0, 1]."""
    if sampling not in LANGUAGE_SAMPLINGS:
        raise UserError(f"language_sampling must be one of {LANGUAGE_SAMPLINGS} or None, got {sampling!r}")
    if not 0 <= exponent <= 1:
        raise UserError(f"language_sampling_exponent must be in [0, 1], got {exponent}")
