"""The accuracy of the tested models in each language, as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from amtss_fast.runs.report.read import check_metrics
from amtss_fast.training.evaluation import BASELINE, STUDENT, TEACHER

NOTHING_SCORED = "Nothing was scored: the data has no test or validation split with labels."


@dataclass(frozen=True)
class Cell:
    """One accuracy, or one difference of accuracies, as a fraction of 1."""

    value: float | None
    signed: bool = False
    best: bool = False

    def __str__(self) -> str:
        if self.value is None:
            return "-"
        return f"{100 * self.value:+.1f}" if self.signed else f"{100 * self.value:.1f}"


@dataclass(frozen=True)
class Table:
    """Rows of a title, the number of texts if it is known, and a cell per model; the last row is the mean."""

    header: list[str]
    rows: list[list[str | Cell]]


def format_table(metrics: Mapping[str, Any]) -> str:
    """The accuracy per language in per cent, for a terminal.

    `gain` is student minus labels only, in points. The last row is the mean over the languages of each column; a
    teacher's is over the languages that it teaches.

    Raises:
        UserError: no metrics of a run.
    """
    check_metrics(metrics)
    if not metrics["test"]:
        return NOTHING_SCORED
    table = accuracy_table(metrics)
    lines = [table.header, *([str(cell) for cell in row] for row in table.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for first, *others in lines:
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True))]
        text.append("  ".join(cells).rstrip())
    rule = "-" * max(map(len, text))
    return "\n".join([text[0], rule, *text[1:-1], rule, text[-1]])


def accuracy_table(metrics: Mapping[str, Any]) -> Table:
    """Columns: language, number of texts, models; `gain` stands after the model of labels only."""
    systems, student = tested_systems(metrics), metrics["test"][STUDENT]["per_language"]
    counted = all("count" in cell for cell in student.values())
    header = ["language", *(["texts"] if counted else []), *map(short_name, systems)]
    if BASELINE in systems:
        header.insert(header.index(BASELINE) + 1, "gain")
    rows: list[list[str | Cell]] = []
    for code in metrics["languages"]:
        texts = f"{student[code]['count']:,}" if counted and code in student else "-"
        cells = _cells(systems, [accuracy(metrics, name, code) for name in systems], mark_best=True)
        rows.append([code, *([texts] if counted else []), *cells])
    texts = f"{sum(cell['count'] for cell in student.values()):,}" if counted else ""
    means = [mean(accuracy(metrics, name, code) for code in metrics["languages"]) for name in systems]
    # Means over different languages are not comparable: none is marked as the best.
    rows.append(["mean", *([texts] if counted else []), *_cells(systems, means, mark_best=False)])
    return Table(header, rows)


def _cells(systems: Sequence[str], values: Sequence[float | None], mark_best: bool) -> list[Cell]:
    known = [value for value in values if value is not None]
    best = max(known) if mark_best and len(known) > 1 else None
    cells = [Cell(value, best=value is not None and value == best) for value in values]
    if BASELINE in systems:
        cells.insert(2, Cell(difference(values[0], values[1]), signed=True))
    return cells


def tested_systems(metrics: Mapping[str, Any]) -> list[str]:
    """The tested models: the student, the one of labels only, then the teachers."""
    first = [name for name in (STUDENT, BASELINE) if name in metrics["test"]]
    return first + [name for name in metrics["test"] if name not in first]


def tested_teachers(metrics: Mapping[str, Any]) -> list[str]:
    """The tested models that are neither the student nor the one of labels only."""
    return [name for name in tested_systems(metrics) if name not in (STUDENT, BASELINE)]


def short_name(system: str, most: int = 24) -> str:
    """The name of a model in at most so many letters, without the prefix of teachers."""
    name = system.removeprefix(TEACHER)
    # The middle is left out, because Hub ids differ at their ends.
    return name if len(name) <= most else f"{name[: most // 2]}…{name[-(most // 2 - 1) :]}"


def accuracy(metrics: Mapping[str, Any], system: str, code: str) -> float | None:
    """The accuracy of a model in a language; None where it was not tested."""
    cell = metrics["test"][system]["per_language"].get(code)
    return None if cell is None else float(cell["accuracy"])


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are known; None if none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def difference(first: float | None, second: float | None) -> float | None:
    """First minus second; None if one is unknown."""
    return None if first is None or second is None else first - second
