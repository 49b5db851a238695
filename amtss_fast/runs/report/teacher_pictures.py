"""Pictures of the teachers: weights and margins per language, and the adaptive strategy over the steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from amtss_fast.runs.report.read import RunRecord
from amtss_fast.runs.report.svg import (
    INK,
    MUTED,
    NEGATIVE,
    POSITIVE,
    TEACHER_COLORS,
    WIDTH,
    Picture,
    teacher_styles,
    to_svg,
)
from amtss_fast.runs.report.table import short_name
from amtss_fast.training.evaluation import TEACHER

_TITLES = {"teacher_weight": "Weight", "teacher_margin": "Margin"}
_LANGUAGE_WEIGHT = "weight of the language"


class _Cells(NamedTuple):
    """The last logged value of each (teacher, language), and the teachers."""

    values: dict[tuple[str, str], float]
    teachers: list[str]


def draw_teachers(record: RunRecord) -> Picture | None:
    """A table of weights and one of margins, in shades; None if neither was logged."""
    logged = {key: _last_cells(record.log, key) for key in _TITLES}
    found = {key: cells for key, cells in logged.items() if cells.values}
    if not found:
        return None
    languages = record.metrics["languages"]
    columns = max(len(cells.teachers) for cells in found.values())
    width = min(WIDTH, max(4.5, 1 + 0.95 * columns) * len(found))
    figure = Figure(figsize=(width, 1.2 + 0.28 * len(languages)), layout="constrained")
    axes = figure.subplots(1, len(found), squeeze=False)[0]
    for axis, (key, cells) in zip(axes, found.items(), strict=True):
        _draw_cells(axis, cells, languages)
        axis.set(title=_TITLES[key], xlim=(-0.5, len(cells.teachers) - 0.5), ylim=(len(languages) - 0.5, -0.5))
        axis.set_yticks(range(len(languages)), languages)
        _name_columns(axis, cells.teachers, room=(width / len(found) - 0.6) / len(cells.teachers))
        axis.tick_params(length=0)
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
    caption = (
        "Mean over the rows of a language, as last logged. The weights of a row add up to 1; a dot "
        "marks a language that the teacher does not teach."
    )
    if "teacher_margin" in found:
        caption += (
            " The margin is what the weights are made from: how clearly a teacher prefers the "
            "label, or its own first choice in rows without a label."
        )
    return Picture("Teachers", to_svg(figure, "Teacher weights and margins per language"), caption)


def _last_cells(log: Sequence[Mapping[str, Any]], key: str) -> _Cells:
    values: dict[tuple[str, str], float] = {}
    for entry in log:
        for teacher, row in entry.get(key, {}).items():
            values.update({(teacher, code): float(value) for code, value in row.items()})
    return _Cells(values, list(dict.fromkeys(teacher for teacher, _ in values)))


def _draw_cells(axis: Axes, cells: _Cells, languages: Sequence[str]) -> None:
    largest = max((abs(value) for value in cells.values.values() if math.isfinite(value)), default=0) or 1
    for x, teacher in enumerate(cells.teachers):
        for y, code in enumerate(languages):
            value = cells.values.get((teacher, code))
            text, color = ("·", MUTED) if value is None else (f"{value:.2f}", INK)
            axis.text(x, y, text, ha="center", va="center", fontsize=9, color=color)
            if value is not None and math.isfinite(value):
                axis.add_patch(_shade(x, y, value, abs(value) / largest))


def _shade(x: int, y: int, value: float, alpha: float) -> Rectangle:
    color = POSITIVE if value >= 0 else NEGATIVE
    return Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, linewidth=0, facecolor=color, alpha=alpha)


def _name_columns(axis: Axes, teachers: Sequence[str], room: float) -> None:
    """Names above the columns, level if the longest fits into `room` inches; a letter is about 0.09 inches wide."""
    names = [short_name(name, 20) for name in teachers]
    level = 0.09 * max(map(len, names)) < room
    axis.xaxis.tick_top()
    axis.set_xticks(
        range(len(names)),
        names,
        rotation=0 if level else 35,
        ha="center" if level else "left",
        rotation_mode="anchor",
    )


def draw_adaptive(record: RunRecord) -> Picture | None:
    """For each language the importance of its teachers and its weight; None if the adaptive strategy was off."""
    curves = _adaptive_curves(record.log)
    codes = [code for code in record.metrics["languages"] if code in curves]
    if not codes:
        return None
    colors = {name.removeprefix(TEACHER): color for name, (color, _) in teacher_styles(record.metrics).items()}
    columns = min(5, len(codes))
    rows = math.ceil(len(codes) / columns)
    figure = Figure(figsize=(WIDTH * max(columns, 3) / 5, 0.9 + 1.35 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat
    handles: dict[str, Any] = {}
    for code, axis in zip(codes, grid, strict=False):
        for name, values in curves[code].items():
            style = {"color": colors.get(name, TEACHER_COLORS[0]), "linewidth": 1.5}
            if name == _LANGUAGE_WEIGHT:
                style = {"color": INK, "linewidth": 1.2, "linestyle": "--"}
            steps = sorted(values)
            (handles[short_name(name)],) = axis.plot(steps, [values[step] for step in steps], **style)
        axis.set_title(code)
        axis.set_ylim(bottom=0)
        axis.set_xlim(left=0)
    # The places that no language takes.
    for axis in grid:
        axis.set_visible(False)
    figure.supxlabel("step", fontsize=10)
    figure.legend(list(handles.values()), list(handles), loc="outside upper left", ncols=min(4, len(handles)))
    caption = "Importance of each teacher in a language; the importances of a language add up to 1."
    if _LANGUAGE_WEIGHT in handles:
        caption += " Dashed: the weight of the language in the loss, 1 on average over the rows."
    return Picture("Adaptive strategy", to_svg(figure, "Adaptive strategy over training steps"), caption)


def _adaptive_curves(log: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[float, float]]]:
    """{language: {teacher, or weight of the language: {step: value}}}."""
    curves: dict[str, dict[str, dict[float, float]]] = {}
    for entry in log:
        for teacher, row in entry.get("teacher_importance", {}).items():
            for code, value in row.items():
                curves.setdefault(code, {}).setdefault(teacher, {})[entry["step"]] = value
        for code, value in entry.get("language_weight", {}).items():
            curves.setdefault(code, {}).setdefault(_LANGUAGE_WEIGHT, {})[entry["step"]] = value
    return curves
