"""Pictures of the student: accuracy per language, and the curves of its training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from amtss_fast.runs.report.read import RunRecord, is_number
from amtss_fast.runs.report.svg import (
    BASELINE_COLOR,
    INK,
    MUTED,
    PAPER,
    STUDENT_COLOR,
    TEACHER_COLORS,
    WIDTH,
    Picture,
    teacher_styles,
    to_svg,
)
from amtss_fast.runs.report.table import accuracy, mean, short_name, tested_systems
from amtss_fast.training.evaluation import BASELINE, STUDENT

_Curve: TypeAlias = tuple[list[float], list[float]]
"""Steps and values."""

_LOSS_STYLES: dict[str, dict[str, Any]] = {
    "loss": {"label": "training", "color": STUDENT_COLOR, "linewidth": 1.8},
    "kd": {"label": "its distillation term", "color": TEACHER_COLORS[0], "linewidth": 1.2},
    "ce": {"label": "its label term", "color": BASELINE_COLOR, "linewidth": 1.2},
    "eval_loss": {
        "label": "validation",
        "color": INK,
        "linestyle": "--",
        "marker": "o",
        "markersize": 3.5,
        "linewidth": 1.2,
    },
}


def draw_accuracy(record: RunRecord) -> Picture:
    """A row per language and a dot per model."""
    metrics, languages = record.metrics, record.metrics["languages"]
    figure = Figure(figsize=(WIDTH, 1.5 + 0.3 * len(languages)), layout="constrained")
    axis: Axes = figure.subplots()
    if BASELINE in metrics["test"]:
        _join_students(axis, metrics)
    handles, values = {}, []
    for name, style in _dot_styles(metrics).items():
        found = [(accuracy(metrics, name, code), y) for y, code in enumerate(languages)]
        points = [(100 * x, y) for x, y in found if x is not None]
        values += [x for x, _ in points]
        handles[name] = axis.scatter([x for x, _ in points], [y for _, y in points], **style)
    axis.set_yticks(range(len(languages)), languages)
    axis.set_ylim(len(languages) - 0.5, -0.5)
    axis.grid(axis="y", alpha=0.6)
    axis.tick_params(axis="y", length=0)
    low, high = _range(values)
    axis.set_xlim(low, high)
    axis.set_xlabel(f"accuracy on the {metrics.get('split') or 'test'} split, %")
    titles = {name: short_name(name) for name in tested_systems(metrics)}
    figure.legend(
        [handles[name] for name in titles],
        list(titles.values()),
        loc="outside upper left",
        # One line where it fits, else a few columns.
        ncols=len(titles) if sum(len(title) + 5 for title in titles.values()) < 105 else 4,
        columnspacing=1.4,
        handletextpad=0.3,
    )
    caption = f"Each row is a language. The axis runs from {low} to {high} %."
    if teacher_styles(metrics):
        caption += " A teacher stands only in the languages that it teaches."
    heading = "Accuracy per language"
    return Picture(heading, to_svg(figure, heading), caption + _sampling_error(metrics, values))


def _dot_styles(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    styles: dict[str, dict[str, Any]] = {
        name: {"color": color, "marker": marker, "s": 34, "zorder": 6}
        for name, (color, marker) in teacher_styles(metrics).items()
    }
    if BASELINE in metrics["test"]:
        styles[BASELINE] = {"facecolor": PAPER, "edgecolor": BASELINE_COLOR, "linewidth": 1.8, "s": 46, "zorder": 4}
    styles[STUDENT] = {"color": STUDENT_COLOR, "s": 64, "zorder": 5}
    return styles


def _join_students(axis: Axes, metrics: Mapping[str, Any]) -> None:
    """A line from the model of labels only to the student in each language."""
    for y, code in enumerate(metrics["languages"]):
        ends = [accuracy(metrics, name, code) for name in (BASELINE, STUDENT)]
        known = [100 * x for x in ends if x is not None]
        if len(known) == 2:
            axis.plot(known, [y, y], color=MUTED, linewidth=1.4, zorder=2)


def _range(values: Sequence[float]) -> tuple[int, int]:
    """Whole tens around the values, at least 20 points wide, so that small differences look small."""
    low, high = math.floor((min(values) - 1) / 10) * 10, math.ceil((max(values) + 1) / 10) * 10
    high = min(100, high)
    low = max(0, min(low, high - 20))
    return low, max(high, low + 20)


def _sampling_error(metrics: Mapping[str, Any], values: Sequence[float]) -> str:
    """Half of the 95 % interval of an accuracy p over n texts, 1.96 √(p (1 - p) / n), for the smallest language."""
    counts = [cell["count"] for cell in metrics["test"][STUDENT]["per_language"].values() if cell.get("count")]
    if not counts:
        return ""
    p, n = mean(value / 100 for value in values) or 0, min(counts)
    half = 196 * math.sqrt(p * (1 - p) / n)
    return f" With {n:,} texts in the smallest language a single accuracy is known to about ±{half:.1f} points (95 %)."


def draw_training(record: RunRecord) -> Picture | None:
    """Loss and validation accuracy over the steps; None if neither was logged."""
    losses = {key: _curve(record.log, key) for key in _LOSS_STYLES}
    total = _curve(record.log, "eval_accuracy")
    has_loss, has_accuracy = any(steps for steps, _ in losses.values()), bool(total[0])
    if not has_loss and not has_accuracy:
        return None
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    axes = list(figure.subplots(1, has_loss + has_accuracy, squeeze=False)[0])
    caption = []
    if has_loss:
        caption += _draw_loss(axes.pop(0), losses)
    if has_accuracy:
        codes = record.metrics["languages"]
        caption += _draw_validation(axes.pop(0), total, [_curve(record.log, f"eval_accuracy_{c}") for c in codes])
    return Picture("Training", to_svg(figure, "Loss and accuracy over training steps"), " ".join(caption))


def _curve(log: Sequence[Mapping[str, Any]], key: str) -> _Curve:
    # A resumed run logs some steps twice; the last value counts.
    values = {entry["step"]: entry[key] for entry in log if is_number(entry.get(key))}
    steps = sorted(values)
    return steps, [values[step] for step in steps]


def _draw_loss(axis: Axes, losses: Mapping[str, _Curve]) -> list[str]:
    for key, style in _LOSS_STYLES.items():
        if losses[key][0]:
            axis.plot(*losses[key], **style)
    axis.set(title="Loss", xlabel="step")
    axis.set_xlim(left=0)
    axis.legend(loc="upper right")
    caption = ["Loss of the student over its training steps."]
    broken = sum(not math.isfinite(value) for _, values in losses.values() for value in values)
    if broken:
        caption.append(f"{broken} logged values are not finite and not drawn.")
    return caption


def _draw_validation(axis: Axes, total: _Curve, languages: Sequence[_Curve]) -> list[str]:
    by_step: dict[float, list[float]] = {}
    for curve in languages:
        for step, value in zip(*curve, strict=True):
            by_step.setdefault(step, []).append(100 * value)
    if by_step:
        steps = sorted(by_step)
        low, high = [min(by_step[step]) for step in steps], [max(by_step[step]) for step in steps]
        label = "worst to best language"
        axis.fill_between(steps, low, high, color=STUDENT_COLOR, alpha=0.18, linewidth=0, label=label)
    steps, values = total
    style: dict[str, Any] = {"color": STUDENT_COLOR, "marker": "o", "markersize": 3.5, "linewidth": 1.8}
    axis.plot(steps, [100 * value for value in values], label="all languages", **style)
    axis.set(title="Accuracy on the validation split, %", xlabel="step")
    axis.set_xlim(left=0)
    axis.legend(loc="lower right")
    return ["The band reaches from the worst to the best language."] if by_step else []
