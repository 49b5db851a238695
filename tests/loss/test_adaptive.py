"""The adaptive strategy against its formulas, row by row."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import run_in_two_processes
from torch import Tensor

from amtss_fast import AdaptiveStrategy, AMTSSStats, amtss_loss

K, L = 3, 4


def batch(n: int = 64, seed: int = 0, **options: Any) -> tuple[AMTSSStats, Tensor, Tensor, Tensor]:
    """Statistics of a loss, language ids, the teachers' mask and which rows have a label."""
    g = torch.Generator().manual_seed(seed)
    student, teachers = torch.randn(n, 5, generator=g), 2 * torch.randn(K, n, 5, generator=g)
    labels = torch.randint(5, (n,), generator=g)
    labels[::4] = -1
    language_ids = torch.randint(L - 1, (n,), generator=g)
    mask = torch.ones(K, n, dtype=torch.bool)
    mask[1, language_ids == 2] = False
    # One teacher is good, one is bad.
    teachers[0].scatter_add_(1, labels.clamp(min=0).unsqueeze(1), torch.full((n, 1), 3.0))
    stats = amtss_loss(student, teachers, labels, teacher_mask=mask, return_stats=True, backend="reference", **options)
    return stats[1], language_ids, mask, labels >= 0


def by_hand(batches: list[Any], **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Importance [K, L] and language weights [L] after these batches, in plain loops over plain means."""
    temperature, floor = options.get("importance_temperature", math.inf), options.get("floor", 0.01)
    sums: dict[tuple[int, int], list[float]] = {}
    shares: dict[tuple[int, int], list[float]] = {}
    alpha = np.full((K, L), 1 / K)
    for stats, ids, mask, counts in batches:
        for n in range(len(ids)):
            if not counts[n]:
                continue
            code, taught = int(ids[n]), [k for k in range(K) if mask[k, n]]
            sums.setdefault((K, code), []).append(float(stats.student_margin[n]))
            evidence = {k: alpha[k, code] * math.exp(float(stats.margins[k, n]) / temperature) for k in taught}
            for k in taught:
                sums.setdefault((k, code), []).append(float(stats.margins[k, n]))
                shares.setdefault((k, code), []).append(evidence[k] / sum(evidence.values()))
        for code in range(L):
            rows = [shares.get((k, code), []) for k in range(K)]
            alpha[:, code] = [max(floor, (sum(row) + 1 / K) / (len(row) + 1)) for row in rows]
        alpha /= alpha.sum(0)
    mean = {key: sum(values) / len(values) for key, values in sums.items()}
    gap, rows_of = np.zeros(L), np.zeros(L)
    for code in range(L):
        seen = [k for k in range(K) if (k, code) in mean]
        if seen:
            knows = sum(alpha[k, code] * mean[k, code] for k in seen) / alpha[seen, code].sum()
            gap[code] = max(0, knows - mean[K, code])
            rows_of[code] = len(sums[K, code])
    weight = np.exp(gap / options.get("gap_temperature", math.inf))
    most = options.get("max_weight", 2.0)
    for _ in range(2):
        weight = np.clip(weight / (weight @ rows_of / rows_of.sum()), 1 / most, most)
    weight = weight / (weight @ rows_of / rows_of.sum())
    return alpha, np.where(rows_of > 0, weight, 1.0)


@pytest.mark.parametrize(
    "options",
    [
        {"importance_temperature": 0.2, "gap_temperature": 0.3},
        {"importance_temperature": 0.05, "gap_temperature": 0.02, "floor": 0.1, "max_weight": 1.2},
        {"importance_temperature": math.inf, "gap_temperature": math.inf},
    ],
)
def test_formulas(options: dict[str, float]) -> None:
    batches = [batch(seed=seed) for seed in range(3)]
    adaptive = AdaptiveStrategy(K, L, **options)
    for stats, ids, mask, counts in batches:
        adaptive.update(stats, ids, teacher_mask=mask, row_mask=counts)
        adaptive.step()
    alpha, weight = by_hand(batches, **options)
    np.testing.assert_allclose(adaptive.importance, alpha, rtol=1e-5)
    np.testing.assert_allclose(adaptive.language_weight, weight, rtol=1e-5)
    ids = batches[0][1]
    np.testing.assert_allclose(adaptive.teacher_prior(ids), alpha[:, ids], rtol=1e-5)
    np.testing.assert_allclose(adaptive.sample_weight(ids), weight[ids], rtol=1e-5)
    if options["importance_temperature"] < 1:
        assert (adaptive.importance[0, :3] > 0.5).all()
        assert (adaptive.language_weight[:3] != 1).all()
        rows = adaptive.state_dict()["rows"]
        assert float((rows * adaptive.language_weight).sum() / rows.sum()) == pytest.approx(1)
    else:
        assert torch.equal(adaptive.language_weight, torch.ones(L))


def test_off_is_exactly_uniform() -> None:
    stats, ids, mask, _ = batch()
    adaptive = AdaptiveStrategy(K, L)
    adaptive.update(stats, ids, teacher_mask=mask)
    adaptive.step()
    assert torch.equal(adaptive.teacher_prior(ids), torch.ones(K, len(ids)))
    assert torch.equal(adaptive.sample_weight(ids), torch.ones(len(ids)))


def test_nothing_known_is_uniform() -> None:
    adaptive = AdaptiveStrategy(K, L, importance_temperature=0.1, gap_temperature=0.1)
    assert torch.equal(adaptive.importance, torch.full((K, L), 1 / K))
    assert torch.equal(adaptive.language_weight, torch.ones(L))


def test_a_batch_counts_from_the_next_step_on_and_its_parts_add_up() -> None:
    stats, ids, mask, counts = batch()
    whole, parts = (AdaptiveStrategy(K, L, importance_temperature=0.1, gap_temperature=0.1) for _ in range(2))
    whole.update(stats, ids, teacher_mask=mask, row_mask=counts)
    for rows in (slice(0, 17), slice(17, None)):
        before = parts.importance.clone()
        part = AMTSSStats(*(value[..., rows] for value in stats))
        parts.update(part, ids[rows], teacher_mask=mask[:, rows], row_mask=counts[rows])
        assert torch.equal(parts.importance, before)
    for adaptive in (whole, parts):
        adaptive.step()
    torch.testing.assert_close(parts.importance, whole.importance)
    torch.testing.assert_close(parts.language_weight, whole.language_weight)


def trained(process: int = 0, processes: int = 1) -> AdaptiveStrategy:
    """Told of held-out rows by the first process, then of every so many rows of three batches."""
    adaptive = AdaptiveStrategy(K, L, importance_temperature=0.1, gap_temperature=0.1)
    if process == 0:
        stats, ids, mask, counts = batch(seed=9)
        adaptive.start(stats.margins, ids, teacher_mask=mask, row_mask=counts)
    adaptive.step()
    rows = slice(process, None, processes)
    for seed in range(3):
        stats, ids, mask, counts = batch(seed=seed)
        part = AMTSSStats(*(value[..., rows] for value in stats))
        adaptive.update(part, ids[rows], teacher_mask=mask[:, rows], row_mask=counts[rows])
        adaptive.step()
    return adaptive


def test_two_processes_have_the_shares_of_one(tmp_path: Path) -> None:
    run_in_two_processes(
        tmp_path,
        f"""
import torch
from torch import distributed as dist
from test_adaptive import trained
dist.init_process_group("gloo")
torch.save(trained(dist.get_rank(), dist.get_world_size()).state_dict(), {str(tmp_path)!r} + f"/{{dist.get_rank()}}.pt")
""",
    )
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    one = trained().state_dict()
    assert set(one) == set(first) == set(second)
    for name, value in one.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value)
    assert (one["shares"].amax(0) - one["shares"].amin(0))[:3].min() > 0.3


def test_memory() -> None:
    """After many rows the mean is an exponential one: a change shows after about `memory` rows."""
    adaptive = AdaptiveStrategy(1, 1, importance_temperature=1.0, memory=100)
    ids = torch.zeros(10, dtype=torch.long)

    def give(margin: float, times: int) -> float:
        for _ in range(times):
            stats = AMTSSStats(
                *(torch.full((10,) if name == "student_margin" else (1, 10), margin) for name in AMTSSStats._fields)
            )
            adaptive.update(stats, ids)
            adaptive.step()
        return float(adaptive.teacher_margin)

    assert give(1.0, 50) == pytest.approx(1)
    # Each step of 10 rows keeps 100 / 110 of the old mean.
    assert give(0.0, 10) == pytest.approx((100 / 110) ** 10)


def test_starts_from_held_out_margins() -> None:
    stats, ids, mask, counts = batch(n=1000)
    adaptive = AdaptiveStrategy(K, L, importance_temperature=0.2, gap_temperature=0.1, floor=0)
    adaptive.start(stats.margins, ids, teacher_mask=mask, row_mask=counts)
    adaptive.step()
    # No student yet, so no gap.
    assert torch.equal(adaptive.language_weight, torch.ones(L))
    # What one more pass over the same rows gives is what it has.
    again = AdaptiveStrategy(K, L, importance_temperature=0.2, floor=0)
    again.load_state_dict(adaptive.state_dict())
    again.update(stats, ids, teacher_mask=mask, row_mask=counts)
    again.step()
    torch.testing.assert_close(again.importance, adaptive.importance, atol=0.01, rtol=0)


def test_start_finds_the_most_likely_mixture() -> None:
    """With log-probabilities as margins, no other weights give held-out labels a higher likelihood."""
    stats, ids, _, counts = batch(n=400, weighting="label_nll")
    adaptive = AdaptiveStrategy(K, L, importance_temperature=1.0, floor=0)
    adaptive.start(stats.margins, ids, row_mask=counts)
    adaptive.step()
    for code in range(L - 1):
        rows = (ids == code) & counts
        probability = stats.margins[:, rows].exp().double()

        def likelihood(alpha: Tensor, p: Tensor = probability) -> float:
            # The row of equal shares counts too.
            return float((alpha.double() @ p).log().sum() + alpha.double().log().sum() / K)

        best = likelihood(adaptive.importance[:, code])
        g = torch.Generator().manual_seed(code)
        others = torch.rand(500, K, generator=g).add(1e-6)
        assert best > likelihood(torch.full((K,), 1 / K))
        assert all(likelihood(other / other.sum()) <= best + 1e-2 for other in others)


def test_teachers_that_know_half_of_the_classes_keep_their_share() -> None:
    """The mean margin of the teacher with a few more rows is higher; in the other's rows it is wrong all the same."""
    margins = torch.full((2, 100), -0.9)
    margins[0, :55], margins[1, 55:] = 0.9, 0.9
    adaptive = AdaptiveStrategy(2, 1, importance_temperature=0.1)
    adaptive.start(margins, torch.zeros(100, dtype=torch.long))
    adaptive.step()
    assert adaptive.importance[:, 0].tolist() == pytest.approx([0.55, 0.45], abs=0.01)


def test_state() -> None:
    options = {"importance_temperature": 0.1, "gap_temperature": 0.1}
    adaptive, resumed = AdaptiveStrategy(K, L, **options), AdaptiveStrategy(K, L, **options)
    for seed in range(4):
        if seed == 2:
            resumed.load_state_dict(adaptive.state_dict())
        for one in (adaptive, resumed):
            stats, ids, mask, counts = batch(seed=seed)
            one.update(stats, ids, teacher_mask=mask, row_mask=counts)
            one.step()
    assert torch.equal(adaptive.importance, resumed.importance)
    assert torch.equal(adaptive.language_weight, resumed.language_weight)
    with pytest.raises(ValueError, match=r"state\['means'\] has shape \[4, 4\], 2 teachers and 4 languages"):
        AdaptiveStrategy(2, 4).load_state_dict(adaptive.state_dict())
    with pytest.raises(ValueError, match="state must hold"):
        adaptive.load_state_dict({})


def test_a_teacher_that_rules_labels_out_keeps_the_floor() -> None:
    adaptive = AdaptiveStrategy(2, 1, importance_temperature=1.0)
    margins = torch.tensor([[-math.inf] * 200, [-1.0] * 200])
    for _ in range(2):
        adaptive.start(margins, torch.zeros(200, dtype=torch.long))
        adaptive.step()
    assert adaptive.importance[:, 0].tolist() == pytest.approx([0.01, 0.99], abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"importance_temperature": 0.0}, "importance_temperature must be above 0"),
        ({"gap_temperature": math.nan}, "gap_temperature must be above 0"),
        ({"floor": 0.4}, r"floor must be in \[0, 1 / 3\]"),
        ({"max_weight": 0.5}, "max_weight must be finite and at least 1"),
        ({"memory": 0}, "memory must be above 0"),
        ({"n_languages": 0}, "n_languages must be at least 1"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptiveStrategy(**{"n_teachers": K, "n_languages": L, **arguments})


def test_shapes_are_checked() -> None:
    stats, ids, mask, counts = batch()
    with pytest.raises(ValueError, match=r"margins of 2 teachers and 64 rows .* must be \[2, 64\], got \[3, 64\]"):
        AdaptiveStrategy(2, L).update(stats, ids)
    with pytest.raises(ValueError, match=r"teacher_mask must be bool \[3, 64\]"):
        AdaptiveStrategy(K, L).update(stats, ids, teacher_mask=mask.T)
    with pytest.raises(ValueError, match=r"row_mask must be bool \[64\]"):
        AdaptiveStrategy(K, L).update(stats, ids, row_mask=counts.long())
