"""The page of a run: its headline figures, pictures, table and settings in `page.html.j2`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from amtss_fast.runs.report.read import RunRecord
from amtss_fast.runs.report.student_pictures import draw_accuracy, draw_training
from amtss_fast.runs.report.svg import RC
from amtss_fast.runs.report.table import (
    NOTHING_SCORED,
    Cell,
    accuracy,
    accuracy_table,
    difference,
    mean,
    short_name,
    tested_teachers,
)
from amtss_fast.runs.report.teacher_pictures import draw_adaptive, draw_teachers
from amtss_fast.training.evaluation import BASELINE, STUDENT

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


class Tile(NamedTuple):
    """A headline figure, its name, and a note below."""

    value: str
    name: str
    note: str


def render_page(record: RunRecord) -> str:
    """The page as HTML; it needs no other file: no script, font or picture from elsewhere."""
    metrics = record.metrics
    with mpl.rc_context(RC):
        draws = (draw_training, draw_teachers, draw_adaptive)
        first = draw_accuracy(record) if metrics["test"] else None
        others = [draw(record) for draw in draws]
    machine = {"machine": metrics["machine"]} if metrics.get("machine") else {}
    return _TEMPLATES.get_template("page.html.j2").render(
        title=metrics.get("task", record.path.resolve().name),
        created=metrics.get("created"),
        tiles=_tiles(metrics),
        first_picture=first,
        pictures=[picture for picture in others if picture is not None],
        table=accuracy_table(metrics) if metrics["test"] else None,
        nothing_scored=NOTHING_SCORED,
        table_note=_table_note(metrics),
        seconds={name: format_duration(value) for name, value in metrics.get("seconds", {}).items()},
        teachers={short_name(name): ", ".join(codes) for name, codes in metrics.get("teacher_languages", {}).items()},
        label_names=", ".join(map(str, metrics.get("label_names") or [])),
        config=record.config,
        versions=machine | metrics.get("versions", {}),
    )


def _tiles(metrics: Mapping[str, Any]) -> list[Tile]:
    return [
        *_student_tiles(metrics),
        *_teacher_tiles(metrics),
        *_size_tiles(metrics.get("sizes", {})),
        *_time_tiles(metrics.get("seconds", {})),
    ]


def _student_tiles(metrics: Mapping[str, Any]) -> list[Tile]:
    if not metrics["test"]:
        return []
    languages = metrics["languages"]
    means = {
        name: mean(accuracy(metrics, name, code) for code in languages)
        for name in (STUDENT, BASELINE)
        if name in metrics["test"]
    }
    counted = "language" if len(languages) == 1 else f"{len(languages)} languages"
    tiles = [Tile(f"{Cell(means[STUDENT])} %", "student", f"mean accuracy, {counted}")]
    if BASELINE in means:
        gain = Cell(difference(means[STUDENT], means[BASELINE]), signed=True)
        tiles.append(Tile(f"{Cell(means[BASELINE])} %", "labels only", f"student {gain} points"))
    return tiles


def _teacher_tiles(metrics: Mapping[str, Any]) -> list[Tile]:
    languages, teachers = metrics["languages"], tested_teachers(metrics)
    taught = [[accuracy(metrics, name, code) for name in teachers] for code in languages]
    best = [max(known) for values in taught if (known := [value for value in values if value is not None])]
    if not best:
        return []
    note = "the best one of each language"
    if len(best) < len(languages):
        note += f", {len(best)} of {len(languages)}"
    return [Tile(f"{Cell(mean(best))} %", "teachers", note)]


def _size_tiles(sizes: Mapping[str, float]) -> list[Tile]:
    if STUDENT not in sizes:
        return []
    others = [size for name, size in sizes.items() if name != STUDENT]
    note = f"the teachers together {format_count(sum(others))}" if others else "of the student"
    return [Tile(format_count(sizes[STUDENT]), "parameters", note)]


def _time_tiles(seconds: Mapping[str, float]) -> list[Tile]:
    return [Tile(format_duration(seconds["total"]), "wall time", "all together")] if "total" in seconds else []


def _table_note(metrics: Mapping[str, Any]) -> str:
    note = f"Accuracy on the {metrics.get('split') or 'test'} split in per cent"
    note += ", the best of each language in bold." if len(metrics["test"]) > 1 else "."
    if BASELINE in metrics["test"]:
        note += " Gain is student minus labels only, in points."
    if tested_teachers(metrics):
        note += " The mean of a teacher is over the languages that it teaches."
    return note


def format_count(number: float) -> str:
    """A count in three digits and thousands (k), millions (M) or billions (G)."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}\u00a0{unit}"
    return f"{number:g}"


def format_duration(seconds: float) -> str:
    """Seconds as seconds, minutes or hours."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
