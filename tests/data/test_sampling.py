"""Languages are drawn as asked, rows of a language all come, and a resumed epoch draws the same ones."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from amtss_fast.data import LanguageSampler

# Language 2 has no rows.
COUNTS = {0: 6000, 1: 1500, 3: 500}
IDS = [language for language, count in COUNTS.items() for _ in range(count)]


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ({"sampling": "proportional"}, [6000, 1500, 500]),
        ({"sampling": "balanced"}, [1, 1, 1]),
        ({"sampling": "temperature", "exponent": 0.5}, [6000**0.5, 1500**0.5, 500**0.5]),
        ({"sampling": "temperature", "exponent": 0.0}, [1, 1, 1]),
        (
            {"sampling": "adaptive", "weights": lambda: torch.tensor([0.5, 2.0, 9.0, 4.0, 1.0])},
            [6000 * 0.5, 1500 * 2, 500 * 4],
        ),
    ],
)
def test_shares(options: dict, shares: list[float]) -> None:
    rows = list(LanguageSampler(IDS, seed=0, **options))
    assert len(rows) == len(IDS)
    found = Counter(IDS[row] for row in rows)
    for language, share in zip(COUNTS, shares, strict=True):
        expected = share / sum(shares)
        # Five standard deviations.
        error = 5 * (expected * (1 - expected) / len(rows)) ** 0.5
        assert abs(found[language] / len(rows) - expected) < error


def test_the_rows_of_a_language_come_equally_often() -> None:
    rows = [row for row in LanguageSampler(IDS, "balanced", seed=0) if IDS[row] == 3]
    times = Counter(rows)
    assert len(times) == 500
    assert max(times.values()) - min(times.values()) <= 1


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = LanguageSampler(IDS, "temperature", seed=seed)
        sampler.set_epoch(epoch)
        assert list(sampler) == list(sampler)
        return list(sampler)

    orders = [order(*key) for key in itertools.product((0, 1), (0, 1))]
    assert orders[0] == order(0, 0)
    assert len({tuple(order) for order in orders}) == 4


def test_a_resumed_epoch_draws_the_same_rows() -> None:
    weights = torch.tensor([1.0, 1.0, 1.0, 1.0])

    def make() -> LanguageSampler:
        return LanguageSampler(IDS, "adaptive", seed=0, weights=lambda: weights, chunk=100)

    whole = make()
    whole.set_epoch(2)
    rows = []
    for number, row in enumerate(whole):
        if number == 1234:
            state = whole.state_dict()
            later = weights.clone()
        rows.append(row)
        weights = weights.roll(1) * 1.01
    assert len(state["drawn"]) == 13
    resumed = make()
    resumed.load_state_dict(state)
    resumed.set_epoch(2)
    # The weights of the chunks before are long gone.
    weights = torch.tensor([9.0, 1.0, 1.0, 1.0])
    again = []
    for number, row in enumerate(resumed):
        if number == 1234:
            weights = later
        again.append(row)
        if number >= 1234:
            weights = weights.roll(1) * 1.01
    assert again == rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": "even"}, "language_sampling must be one of"),
        ({"sampling": "temperature", "exponent": -1.0}, "must be in"),
        ({"sampling": "adaptive"}, "weights belong to sampling='adaptive'"),
        ({"sampling": "balanced", "weights": lambda: torch.ones(4)}, "weights belong to sampling='adaptive'"),
        ({"sampling": "balanced", "chunk": 0}, "chunk must be at least 1"),
    ],
)
def test_arguments_are_checked(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LanguageSampler(IDS, seed=0, **options)
