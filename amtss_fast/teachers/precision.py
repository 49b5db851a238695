"""What fewer bits change in a run's own teachers: their answers, weights, speed and memory.

`amtss-fast teachers check CONFIG` prints it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amtss_fast.loss import AMTSSStats
from amtss_fast.teachers.teacher import TeacherPool

LARGEST_KL = 1e-3
"""Nats: a precision is recommended where no language's mean is above it, ..."""
LEAST_AGREEMENT = 0.99
"""... and where at least this share of each language's rows, one row aside, keep their most likely class."""


@dataclass(frozen=True)
class Answers:
    """What a teacher says in one precision, and what that costs."""

    logits: Tensor
    """[N, C] float32; rows that it does not teach are 0."""
    taught: Tensor
    """[N] bool."""
    first_seconds: float
    """The first batch: compilation and packing of weights too."""
    rows_per_second: float
    """Of all batches, once warm."""
    memory: int
    """Bytes of weights and buffers."""


def ask(pool: TeacherPool, rows: Sequence[Any], collate: Callable[[list[Any]], Any], batch_size: int) -> Answers:
    """All logits of a pool of one teacher on encoded rows, in batches of rows of like length."""
    order = np.argsort([len(row["input_ids"]) for row in rows], kind="stable")
    parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    batches = [collate([rows[int(i)] for i in part]) for part in parts]
    started = time.perf_counter()
    pool.logits(batches[-1])
    first = time.perf_counter() - started
    logits, taught = torch.zeros(len(rows), len(pool.label_names)), torch.zeros(len(rows), dtype=torch.bool)
    started = time.perf_counter()
    for part, batch in zip(parts, batches, strict=True):
        values, mask = pool.logits(batch)
        logits[torch.from_numpy(part)], taught[torch.from_numpy(part)] = values[0].cpu(), mask[0].cpu()
    seconds = time.perf_counter() - started
    return Answers(logits, taught, first, int(taught.sum()) / seconds, pool.memory_footprint())


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
    answers: dict[str, list[Answers]],
    stats: dict[str, AMTSSStats],
) -> list[dict[str, Any]]:
    """One mapping for each teacher and precision but float32: figures per language, costs, and whether it is faithful.

    Args:
        names: of K teachers.
        languages: codes; `language_ids` [N] are places in it.
        answers: for each precision, float32 first, the answers of the K teachers.
        stats: for each precision the loss's statistics with all K teachers in it.
    """
    results = []
    exact = answers["float32"]
    for precision in list(answers)[1:]:
        for k, name in enumerate(names):
            base, this = exact[k], answers[precision][k]
            kl, same = compare(base.logits, this.logits)
            margin = (stats[precision].margins[k] - stats["float32"].margins[k]).abs()
            weight = (stats[precision].weights[k] - stats["float32"].weights[k]).abs()
            per_language = {}
            for index, code in enumerate(languages):
                here = base.taught & (language_ids == index)
                if here.any():
                    per_language[code] = {
                        "rows": int(here.sum()),
                        "kl": float(kl[here].mean()),
                        "agreement": float(same[here].double().mean()),
                        "margin_change": float(margin[here].mean()),
                        "weight_change": float(weight[here].mean()),
                    }
            results.append(
                {
                    "teacher": name,
                    "precision": precision,
                    "languages": per_language,
                    "speedup": this.rows_per_second / base.rows_per_second,
                    "rows_per_second": this.rows_per_second,
                    "first_seconds": this.first_seconds,
                    "memory": this.memory,
                    "memory_share": this.memory / base.memory,
                    "faithful": all(map(_within, per_language.values())),
                }
            )
    return results


def _within(figures: dict[str, Any]) -> bool:
    """Whether a language's figures are within the limits; a single row with another class never decides."""
    others = round((1 - figures["agreement"]) * figures["rows"])
    return bool(figures["kl"] <= LARGEST_KL and others <= max(1, (1 - LEAST_AGREEMENT) * figures["rows"]))


def recommend(results: Sequence[dict[str, Any]], teacher: str) -> tuple[str, str]:
    """The precision to use for a teacher, and why: of the faithful ones the fastest, if it beats float32 by 5 % at
    least; else the smallest.
    """
    own = [r for r in results if r["teacher"] == teacher]
    faithful = [r for r in own if r["faithful"]]
    if not faithful:
        return "float32", "no other precision stays within the limits in each language"
    fastest = max(faithful, key=lambda r: r["speedup"])
    if fastest["speedup"] >= 1.05:
        return fastest[
            "precision"
        ], f"{fastest['speedup']:.2f} times as fast, {fastest['memory_share']:.0%} of the memory"
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
