"""What fewer bits change in a run's own teachers: outputs, weights, speed and memory.

`amtss-fast teachers check CONFIG` prints it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amtss_fast.loss import AMTSSStats
from amtss_fast.teachers.batching import batches_by_length
from amtss_fast.teachers.contract import dense
from amtss_fast.teachers.pool import LiveTeachers

LARGEST_KL = 1e-3
"""Nats. A precision is recommended where no language's mean is above it, ..."""
LEAST_AGREEMENT = 0.99
"""... and where at least this share of each language's rows, one row aside, keep their most likely class."""


@dataclass(frozen=True)
class Measurement:
    """A teacher's outputs in one precision, and their cost."""

    logits: Tensor
    """[N, C] float32; rows that it does not teach are 0."""
    taught: Tensor
    """[N] bool."""
    first_seconds: float
    """Of the first batch, with compilation and packing of weights."""
    rows_per_second: float
    """Of all batches after the first one."""
    memory: int
    """Bytes of weights and buffers."""


def measure(
    pool: LiveTeachers, rows: Sequence[Any], collate: Callable[[list[Any]], Mapping[str, Any]], batch_size: int
) -> Measurement:
    """All logits of a pool of one teacher on encoded rows, in batches of rows of similar length."""
    parts = batches_by_length([len(row["input_ids"]) for row in rows], batch_size)
    batches = [collate([rows[int(i)] for i in part]) for part in parts]
    started = time.perf_counter()
    pool.ask(batches[-1])()
    first = time.perf_counter() - started
    logits, taught = torch.zeros(len(rows), len(pool.label_names or ())), torch.zeros(len(rows), dtype=torch.bool)
    started = time.perf_counter()
    for part, batch in zip(parts, batches, strict=True):
        answers = pool.ask(batch)()
        logits[torch.from_numpy(part)] = dense(answers.outputs[0]).cpu()
        taught[torch.from_numpy(part)] = answers.mask[0].cpu()
    seconds = time.perf_counter() - started
    return Measurement(logits, taught, first, int(taught.sum()) / seconds, pool.memory_footprint())


def compare(exact: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """KL(softmax(exact) || softmax(other)) [N] in nats, and whether the most likely class is the same [N].

    Where two classes of `exact` are tied, either counts as the same.
    """
    p, q = exact.double().log_softmax(-1), other.double().log_softmax(-1)
    same = p.gather(1, q.argmax(-1, keepdim=True)).squeeze(1) == p.amax(-1)
    return (p.exp() * (p - q)).sum(-1), same


def changes(
    names: Sequence[str],
    languages: Sequence[str],
    language_ids: Tensor,
    measurements: Mapping[str, Sequence[Measurement]],
    stats: Mapping[str, AMTSSStats],
) -> list[dict[str, Any]]:
    """One mapping for each teacher and precision but float32: figures per language, costs, and whether it is faithful.

    Args:
        names: of K teachers.
        languages: codes; `language_ids` [N] are places in it.
        language_ids: of the measured rows.
        measurements: for each precision, float32 first, those of the K teachers.
        stats: for each precision the loss's statistics with all K teachers in it.
    """
    results = []
    for precision in list(measurements)[1:]:
        # [K, N]
        margins = (stats[precision].margins - stats["float32"].margins).abs()
        weights = (stats[precision].weights - stats["float32"].weights).abs()
        for k, name in enumerate(names):
            base, this = measurements["float32"][k], measurements[precision][k]
            per_language = {}
            for index, code in enumerate(languages):
                here = base.taught & (language_ids == index)
                if here.any():
                    per_language[code] = _figures(base.logits[here], this.logits[here]) | {
                        "margin_change": float(margins[k][here].mean()),
                        "weight_change": float(weights[k][here].mean()),
                    }
            costs = _costs(base, this)
            faithful = all(map(_within, per_language.values()))
            results.append(
                {"teacher": name, "precision": precision, "languages": per_language, **costs, "faithful": faithful}
            )
    return results


def _figures(exact: Tensor, other: Tensor) -> dict[str, Any]:
    kl, same = compare(exact, other)
    return {"rows": len(exact), "kl": float(kl.mean()), "agreement": float(same.double().mean())}


def _costs(base: Measurement, this: Measurement) -> dict[str, Any]:
    return {
        "speedup": this.rows_per_second / base.rows_per_second,
        "rows_per_second": this.rows_per_second,
        "first_seconds": this.first_seconds,
        "memory": this.memory,
        "memory_share": this.memory / base.memory,
    }


def _within(figures: dict[str, Any]) -> bool:
    """Whether a language's figures are within the limits; one row with another class is always allowed."""
    others = round((1 - figures["agreement"]) * figures["rows"])
    return bool(figures["kl"] <= LARGEST_KL and others <= max(1, (1 - LEAST_AGREEMENT) * figures["rows"]))


def recommend(results: Sequence[dict[str, Any]], teacher: str) -> tuple[str, str]:
    """The precision to use for a teacher, and why.

    It is the fastest of the faithful ones if that beats float32 by at least 5 %, else float32; then the reason names
    the faithful one that takes the least memory.
    """
    own = [r for r in results if r["teacher"] == teacher]
    faithful = [r for r in own if r["faithful"]]
    if not faithful:
        return "float32", "no other precision stays within the limits in each language"
    fastest = max(faithful, key=lambda r: r["speedup"])
    if fastest["speedup"] >= 1.05:
        why = f"{fastest['speedup']:.2f} times as fast, {fastest['memory_share']:.0%} of the memory"
        return fastest["precision"], why
    smallest = min(faithful, key=lambda r: r["memory_share"])
    return "float32", (
        f"no faithful precision is faster here; where memory is short {smallest['precision']} takes "
        f"{smallest['memory_share']:.0%} of it at {smallest['speedup']:.2f} times the speed"
    )


def format_changes(results: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """The table, and a recommendation for each teacher."""
    header = f"{'teacher':14} {'precision':20} {'language':9} {'rows':>5} {'KL, nats':>9} {'same class':>10}"
    lines = [f"{header} {'|Δ margin|':>10} {'|Δ weight|':>10}"]
    for r in results:
        for code, v in r["languages"].items():
            over = "" if _within(v) else " <-"
            lines.append(
                f"{r['teacher']:14} {r['precision']:20} {code:9} {v['rows']:5} {v['kl']:9.1e} {v['agreement']:10.1%} "
                f"{v['margin_change']:10.1e} {v['weight_change']:10.1e}{over}"
            )
    lines += [
        "",
        f"{'teacher':14} {'precision':20} {'rows/s':>8} {'speed':>7} {'MiB':>8} {'memory':>7} {'first call':>10}",
    ]
    for r in results:
        lines.append(
            f"{r['teacher']:14} {r['precision']:20} {r['rows_per_second']:8.1f} {r['speedup']:6.2f}x "
            f"{r['memory'] / 2**20:8.1f} {r['memory_share']:7.0%} {r['first_seconds']:8.1f} s"
        )
    lines.append("")
    lines += [f"{name}: use {precision} ({why})" for name in names for precision, why in [recommend(results, name)]]
    lines.append(
        f"Limits (<-): mean KL {LARGEST_KL:g} nats and {LEAST_AGREEMENT:.0%} of a language's rows, one aside, with the "
        "same class. Changes are mean magnitudes against float32; weights with all teachers in the precision."
    )
    return "\n".join(lines)
