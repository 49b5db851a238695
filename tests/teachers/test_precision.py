"""What is said about fewer bits: figures against float64 by hand, and the recommendation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from amtss_fast import amtss_loss
from amtss_fast.teachers.precision import Measurement, _within, changes, compare, format_changes, recommend


def test_compare() -> None:
    exact, other = (
        torch.tensor([[2.0, 1.0], [0.0, 0.0], [3.0, 0.0]]),
        torch.tensor([[1.0, 2.0], [0.0, 0.5], [3.0, 0.0]]),
    )
    kl, same = compare(exact, other)
    p, q = exact.double().softmax(-1), other.double().softmax(-1)
    torch.testing.assert_close(kl, (p * (p / q).log()).sum(-1))
    # The tie of the second row may fall either way.
    assert same.tolist() == [False, True, True]


def test_changes_are_those_of_each_teacher_and_language() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(40, 3, generator=generator) for _ in range(2)]
    other = [t + 0.1 * torch.randn(40, 3, generator=generator) for t in exact]
    taught = torch.ones(2, 40, dtype=torch.bool)
    ids = torch.arange(40) % 2
    taught[1] = ids == 1
    measured, stats = {}, {}
    for name, logits in (("float32", exact), ("int8", other)):
        measured[name] = [Measurement(t, m, 1.0, 20.0, 100) for t, m in zip(logits, taught, strict=True)]
        _, stats[name] = amtss_loss(torch.zeros(40, 3), logits, teacher_mask=taught, return_stats=True)
    results = changes(["a", "b"], ["en", "sw", "ur"], ids, measured, stats)
    assert [list(r["languages"]) for r in results] == [["en", "sw"], ["sw"]]
    kl, same = compare(exact[0], other[0])
    sw = results[0]["languages"]["sw"]
    assert sw["kl"] == pytest.approx(float(kl[1::2].mean()))
    assert sw["agreement"] == pytest.approx(float(same[1::2].double().mean()))
    weight = (stats["int8"].weights - stats["float32"].weights).abs()[0, 1::2].mean()
    assert sw["weight_change"] == pytest.approx(float(weight))
    assert results[0]["languages"]["en"]["weight_change"] == 0
    assert not results[0]["faithful"]
    assert " <-" in format_changes(results, ["a", "b"])


@pytest.mark.parametrize(
    ("bfloat16", "int8", "expected"),
    [
        ((True, 1.5, 0.5), (True, 2.0, 0.3), ("int8", "2.00 times as fast, 30% of the memory")),
        ((True, 1.5, 0.5), (False, 2.0, 0.3), ("bfloat16", "1.50 times as fast, 50% of the memory")),
        ((False, 1.5, 0.5), (False, 2.0, 0.3), ("float32", "no other precision stays within the limits")),
        ((True, 0.2, 0.5), (True, 0.9, 0.3), ("float32", "where memory is short int8 takes 30% of it at 0.90 times")),
    ],
)
def test_recommendation(bfloat16: Any, int8: Any, expected: tuple[str, str]) -> None:
    results = [
        {"teacher": "a", "precision": name, "faithful": faithful, "speedup": speedup, "memory_share": share}
        for name, (faithful, speedup, share) in (("bfloat16", bfloat16), ("int8", int8))
    ]
    precision, why = recommend(results, "a")
    assert precision == expected[0]
    assert expected[1] in why


@pytest.mark.parametrize(
    ("kl", "agreement", "rows", "within"),
    [
        (1e-4, 63 / 64, 64, True),
        (1e-4, 62 / 64, 64, False),
        (1.1e-3, 1.0, 64, False),
        (1e-4, 0.99, 1000, True),
        (0, 0.989, 1000, False),
    ],
)
def test_limits(kl: float, agreement: float, rows: int, within: bool) -> None:
    assert _within({"kl": kl, "agreement": agreement, "rows": rows}) is within
