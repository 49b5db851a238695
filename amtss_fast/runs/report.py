"""A run folder as one HTML page and as a table for the terminal.

`read_run` checks what it reads; `write_report` needs nothing but the files of the run, and its page
needs nothing but itself: no script, no font, no picture from elsewhere.
"""

from __future__ import annotations

import html
import io
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from amtss_fast._system.files import write_atomically
from amtss_fast.training.evaluation import BASELINE, STUDENT, TEACHER

# Stand-ins that matplotlib writes and the page replaces, so that one picture fits light and dark.
_INK, _MUTED, _GRID, _PAPER = "#010101", "#020202", "#030303", "#040404"
_STUDENT, _BASELINE, _HOT, _COLD = "#050505", "#060606", "#070707", "#080808"
_TEACHERS = ("#090909", "#0a0a0a", "#0b0b0b", "#0c0c0c", "#0d0d0d")
_VARIABLES = {
    _INK: "ink",
    _MUTED: "muted",
    _GRID: "grid",
    _PAPER: "paper",
    _STUDENT: "student",
    _BASELINE: "baseline",
    _HOT: "hot",
    _COLD: "cold",
    **{color: f"teacher{n}" for n, color in enumerate(_TEACHERS)},
}
# Inches of a picture as wide as the page.
_WIDTH = 9.0
_MARKERS = ("D", "s", "^", "v", "P", "X", "p", "h")
_RC: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "amtss_fast",
    # A "$" in a name is a dollar.
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _GRID,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Run:
    """The files of a run folder, read and checked."""

    path: Path
    metrics: dict[str, Any]
    log: list[dict[str, Any]]
    config: str | None


def read_run(run_dir: str | Path) -> Run:
    """Reads metrics.json (needed), log.jsonl and config.yaml (where they are) of a run folder.

    Raises FileNotFoundError if there is no metrics.json and ValueError if a file is broken; the
    message names the file and what is wrong.
    """
    path = Path(run_dir)
    metrics = read_metrics(path / "metrics.json")
    log = read_log(path / "log.jsonl") if (path / "log.jsonl").exists() else []
    config = None
    if (path / "config.yaml").exists():
        config = (path / "config.yaml").read_text("utf-8")
        try:
            yaml.safe_load(config)
        except yaml.YAMLError as error:
            raise ValueError(f"{path / 'config.yaml'} is not YAML: {error}") from error
    elif "config" in metrics:
        config = yaml.safe_dump(metrics["config"], sort_keys=False, allow_unicode=True)
    return Run(path, metrics, log, config)


def read_metrics(path: str | Path) -> dict[str, Any]:
    """Reads and checks a metrics.json; raises as `read_run`."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: {path.parent} is not the folder of a run")
    try:
        metrics = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    try:
        _check_metrics(metrics)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return dict(metrics)


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Reads a log.jsonl, one object with a `step` per line; raises ValueError with the line."""
    path = Path(path)
    entries = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(entry, dict) or not _is_number(entry.get("step")):
            raise ValueError(f"{path}, line {number} has no number 'step': {line.strip()[:80]}")
        for name in ("teacher_weight", "teacher_margin", "teacher_importance"):
            table = entry.get(name, {})
            cells = table.values() if isinstance(table, dict) else [None]
            if not all(isinstance(row, dict) and all(map(_is_number, row.values())) for row in cells):
                raise ValueError(f"{path}, line {number}: {name} is not {{teacher: {{language: number}}}}: {table}")
        entries.append(entry)
    return entries


def write_report(run_dir: str | Path) -> Path:
    """Writes report.html into a run folder, in one step, and returns its path.

    The page shows what the run has: losses and accuracy over steps, accuracy per language,
    teacher weights and margins, settings, versions, times. Raises as `read_run`.
    """
    run = read_run(run_dir)
    page = _page(run)
    path = run.path / "report.html"
    write_atomically(path, page)
    return path


def format_table(metrics: Mapping[str, Any]) -> str:
    """The accuracy per language in per cent, for a terminal.

    `gain` is student minus labels only, in points. The last row is the mean over the languages of
    each column; a teacher's is over the languages that it teaches. Raises ValueError for metrics
    that are not those of a run.
    """
    _check_metrics(metrics)
    header, rows = _accuracy_rows(metrics)
    lines = [header, *([_plain(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for line in lines:
        cells = [
            line[0].ljust(widths[0]),
            *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)),
        ]
        text.append("  ".join(cells).rstrip())
    rule = "-" * max(map(len, text))
    return "\n".join([text[0], rule, *text[1:-1], rule, text[-1]])


def _check_metrics(metrics: Any) -> None:
    if not isinstance(metrics, Mapping):
        raise ValueError(f"metrics are an object, not {type(metrics).__name__}")
    for name in ("languages", "test"):
        if name not in metrics:
            raise ValueError(f"no {name!r}; there are {list(metrics)}")
    languages, test = metrics["languages"], metrics["test"]
    if not isinstance(languages, list) or not all(isinstance(code, str) for code in languages):
        raise ValueError(f"'languages' is a list of strings, not {languages!r}")
    if not isinstance(test, Mapping) or STUDENT not in test:
        raise ValueError(f"'test' needs the results of {STUDENT!r}; it has {list(test)}")
    for system, result in test.items():
        if not isinstance(result, Mapping) or not isinstance(result.get("per_language"), Mapping):
            raise ValueError(f"'test' of {system!r} needs 'per_language'")
        if not result["per_language"]:
            raise ValueError(f"'test' of {system!r} has no language in 'per_language'")
        for code, cell in result["per_language"].items():
            if code not in languages:
                raise ValueError(f"{system!r} was tested in {code!r}, which is not in {languages}")
            accuracy = cell.get("accuracy") if isinstance(cell, Mapping) else None
            if accuracy is None or not _is_number(accuracy) or not 0 <= accuracy <= 1:
                raise ValueError(f"accuracy of {system!r} in {code!r} is in [0, 1], not {accuracy!r}")
    for name in ("versions", "seconds", "sizes", "teacher_languages"):
        if not isinstance(metrics.get(name, {}), Mapping):
            raise ValueError(f"{name!r} is an object, not {metrics[name]!r}")
    for name in ("seconds", "sizes"):
        for key, value in metrics.get(name, {}).items():
            if not _is_number(value):
                raise ValueError(f"{name!r} of {key!r} is a number, not {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class _Cell:
    """One figure of the accuracy table."""

    value: float | None
    signed: bool = False
    best: bool = False


def _plain(cell: str | _Cell) -> str:
    if isinstance(cell, str):
        return cell
    if cell.value is None:
        return "-"
    return f"{100 * cell.value:+.1f}" if cell.signed else f"{100 * cell.value:.1f}"


def _systems(metrics: Mapping[str, Any]) -> list[str]:
    """The tested models: the student, the labels-only one, then the teachers."""
    first = [name for name in (STUDENT, BASELINE) if name in metrics["test"]]
    return first + [name for name in metrics["test"] if name not in first]


def _title(system: str, most: int = 24) -> str:
    name = system.removeprefix(TEACHER)
    # Hub ids differ at their ends, so the middle goes.
    return name if len(name) <= most else f"{name[: most // 2]}…{name[-(most // 2 - 1) :]}"


def _accuracy(metrics: Mapping[str, Any], system: str, code: str) -> float | None:
    cell = metrics["test"][system]["per_language"].get(code)
    return None if cell is None else float(cell["accuracy"])


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _difference(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first - second


def _accuracy_rows(metrics: Mapping[str, Any]) -> tuple[list[str], list[list[str | _Cell]]]:
    """Header and rows: language, texts, systems; `gain` stands after labels only."""
    systems, student = _systems(metrics), metrics["test"][STUDENT]["per_language"]
    compared = BASELINE in systems
    counted = all("count" in cell for cell in student.values())
    header = ["language", *(["texts"] if counted else []), *(_title(name) for name in systems)]
    if compared:
        header.insert(header.index(BASELINE) + 1, "gain")

    def row(title: str, texts: str, values: Sequence[float | None], mark: bool) -> list[str | _Cell]:
        known = [value for value in values if value is not None]
        cells: list[str | _Cell] = [
            _Cell(v, best=mark and len(known) > 1 and v is not None and v == max(known)) for v in values
        ]
        if compared:
            cells.insert(2, _Cell(_difference(values[0], values[1]), signed=True))
        return [title, *([texts] if counted else []), *cells]

    rows = []
    for code in metrics["languages"]:
        texts = f"{student[code]['count']:,}" if counted and code in student else "-"
        rows.append(row(code, texts, [_accuracy(metrics, name, code) for name in systems], True))
    total = f"{sum(cell['count'] for cell in student.values()):,}" if counted else ""
    means = [_mean(_accuracy(metrics, name, code) for code in metrics["languages"]) for name in systems]
    # Means over different languages do not compete: no best one.
    rows.append(row("mean", total, means, False))
    return header, rows


def _svg(figure: Figure, title: str) -> str:
    """The figure as an SVG element for the page, its colours as CSS variables."""
    buffer = io.StringIO()
    # Without metadata there is no date and no foreign address in the file.
    empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with warnings.catch_warnings():
        # Text stays text: the reader's fonts draw it, whatever this font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata=empty, transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    _, _, body = svg.partition(">")
    box = svg.partition('viewBox="')[2].partition('"')[0]
    for color, name in _VARIABLES.items():
        body = body.replace(color, f"var(--{name})")
    # Identifiers must differ between the pictures of one page.
    prefix = re.sub(r"\W+", "-", title.lower())
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", body)
    body = body.replace("'DejaVu Sans'", "system-ui")
    share = figure.get_figwidth() / _WIDTH
    return f'<svg style="--w:{share:.3f}" viewBox="{box}" role="img" aria-label="{html.escape(title)}">{body.strip()}'


def _points(log: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    # A resumed run logs some steps again; the last word counts.
    values = {entry["step"]: entry[key] for entry in log if _is_number(entry.get(key))}
    steps = sorted(values)
    return steps, [values[step] for step in steps]


def _loss_picture(run: Run) -> tuple[str, str] | None:
    lines = {key: _points(run.log, key) for key in ("loss", "kd", "ce", "eval_loss")}
    accuracy = _points(run.log, "eval_accuracy")
    has_loss, has_accuracy = any(steps for steps, _ in lines.values()), bool(accuracy[0])
    if not has_loss and not has_accuracy:
        return None
    figure = Figure(figsize=(_WIDTH, 3.2), layout="constrained")
    axes = list(figure.subplots(1, has_loss + has_accuracy, squeeze=False)[0])
    caption = []
    if has_loss:
        axis = axes.pop(0)
        styles: dict[str, dict[str, Any]] = {
            "loss": {"label": "training", "color": _STUDENT, "linewidth": 1.8},
            "kd": {"label": "its distillation term", "color": _TEACHERS[0], "linewidth": 1.2},
            "ce": {"label": "its label term", "color": _BASELINE, "linewidth": 1.2},
            "eval_loss": {
                "label": "validation",
                "color": _INK,
                "linestyle": "--",
                "marker": "o",
                "markersize": 3.5,
                "linewidth": 1.2,
            },
        }
        for key, style in styles.items():
            if lines[key][0]:
                axis.plot(*lines[key], **style)
        axis.set(title="Loss", xlabel="step")
        axis.set_xlim(left=0)
        axis.legend(loc="upper right")
        caption.append("Loss of the student over its training steps.")
        broken = sum(not math.isfinite(value) for _, values in lines.values() for value in values)
        if broken:
            caption.append(f"{broken} logged values are not finite and not drawn.")
    if has_accuracy:
        axis = axes.pop(0)
        single: dict[float, list[float]] = {}
        for code in run.metrics["languages"]:
            for step, value in zip(*_points(run.log, f"eval_accuracy_{code}"), strict=True):
                single.setdefault(step, []).append(100 * value)
        if single:
            steps = sorted(single)
            low, high = [min(single[step]) for step in steps], [max(single[step]) for step in steps]
            axis.fill_between(
                steps,
                low,
                high,
                color=_STUDENT,
                alpha=0.18,
                linewidth=0,
                label="worst to best language",
            )
            caption.append("The band reaches from the worst to the best language.")
        axis.plot(
            accuracy[0],
            [100 * value for value in accuracy[1]],
            color=_STUDENT,
            marker="o",
            markersize=3.5,
            linewidth=1.8,
            label="all languages",
        )
        axis.set(title="Accuracy on the validation split, %", xlabel="step")
        axis.set_xlim(left=0)
        axis.legend(loc="lower right")
    return _svg(figure, "Loss and accuracy over training steps"), " ".join(caption)


def _teacher_styles(metrics: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each teacher, the same in the whole page."""
    names = [name for name in _systems(metrics) if name not in (STUDENT, BASELINE)]
    return {name: (_TEACHERS[n % len(_TEACHERS)], _MARKERS[n % len(_MARKERS)]) for n, name in enumerate(names)}


def _accuracy_picture(run: Run) -> tuple[str, str]:
    metrics, languages = run.metrics, run.metrics["languages"]
    figure = Figure(figsize=(_WIDTH, 1.5 + 0.3 * len(languages)), layout="constrained")
    axis: Axes = figure.subplots()
    styles: dict[str, dict[str, Any]] = {
        name: {"color": color, "marker": marker, "s": 34, "zorder": 6}
        for name, (color, marker) in _teacher_styles(metrics).items()
    }
    if BASELINE in metrics["test"]:
        styles[BASELINE] = {
            "facecolor": _PAPER,
            "edgecolor": _BASELINE,
            "linewidth": 1.8,
            "s": 46,
            "zorder": 4,
        }
        for y, code in enumerate(languages):
            ends = [_accuracy(metrics, name, code) for name in (BASELINE, STUDENT)]
            if None not in ends:
                axis.plot([100 * (x or 0) for x in ends], [y, y], color=_MUTED, linewidth=1.4, zorder=2)
    styles[STUDENT] = {"color": _STUDENT, "s": 64, "zorder": 5}
    values = []
    handles = {}
    for name, style in styles.items():
        found = [(_accuracy(metrics, name, code), y) for y, code in enumerate(languages)]
        points = [(100 * x, y) for x, y in found if x is not None]
        values += [x for x, _ in points]
        handles[name] = axis.scatter([x for x, _ in points], [y for _, y in points], **style)
    axis.set_yticks(range(len(languages)), languages)
    axis.set_ylim(len(languages) - 0.5, -0.5)
    axis.grid(axis="y", alpha=0.6)
    axis.tick_params(axis="y", length=0)
    # Whole tens around the dots, at least 20 points wide: small differences must look small.
    low, high = math.floor((min(values) - 1) / 10) * 10, math.ceil((max(values) + 1) / 10) * 10
    high = min(100, high)
    low = max(0, min(low, high - 20))
    high = max(high, low + 20)
    axis.set_xlim(low, high)
    axis.set_xlabel("accuracy on the test split, %")
    titles = {name: _title(name) for name in _systems(metrics)}
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
    if _teacher_styles(metrics):
        caption += " A teacher stands only in the languages that it teaches."
    counts = [cell["count"] for cell in metrics["test"][STUDENT]["per_language"].values() if cell.get("count")]
    if counts:
        mean, count = _mean(value / 100 for value in values) or 0, min(counts)
        half = 196 * math.sqrt(mean * (1 - mean) / count)
        caption += (
            f" With {count:,} texts in the smallest language a single accuracy is known "
            f"to about ±{half:.1f} points (95 %)."
        )
    return _svg(figure, "Accuracy per language"), caption


def _last_cells(run: Run, key: str) -> tuple[dict[tuple[str, str], float], list[str]]:
    """The last logged value of each (teacher, language), and the teachers."""
    cells: dict[tuple[str, str], float] = {}
    for entry in run.log:
        for teacher, row in entry.get(key, {}).items():
            cells.update({(teacher, code): float(value) for code, value in row.items()})
    return cells, list(dict.fromkeys(teacher for teacher, _ in cells))


def _weight_picture(run: Run) -> tuple[str, str] | None:
    found = {key: _last_cells(run, key) for key in ("teacher_weight", "teacher_margin")}
    found = {key: value for key, value in found.items() if value[0]}
    if not found:
        return None
    languages = run.metrics["languages"]
    columns = max(len(teachers) for _, teachers in found.values())
    width = min(_WIDTH, max(4.5, 1 + 0.95 * columns) * len(found))
    figure = Figure(figsize=(width, 1.2 + 0.28 * len(languages)), layout="constrained")
    titles = {"teacher_weight": "Weight", "teacher_margin": "Margin"}
    for axis, (key, (cells, teachers)) in zip(
        figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True
    ):
        finite = [abs(value) for value in cells.values() if math.isfinite(value)]
        largest = max(finite, default=0) or 1
        for x, teacher in enumerate(teachers):
            for y, code in enumerate(languages):
                value = cells.get((teacher, code))
                text = "·" if value is None else f"{value:.2f}"
                axis.text(
                    x,
                    y,
                    text,
                    ha="center",
                    va="center",
                    fontsize=9,
                    color=_MUTED if value is None else _INK,
                )
                if value is not None and math.isfinite(value):
                    axis.add_patch(
                        Rectangle(
                            (x - 0.48, y - 0.46),
                            0.96,
                            0.92,
                            linewidth=0,
                            facecolor=_HOT if value >= 0 else _COLD,
                            alpha=abs(value) / largest,
                        )
                    )
        axis.set(title=titles[key], xlim=(-0.5, len(teachers) - 0.5), ylim=(len(languages) - 0.5, -0.5))
        axis.set_yticks(range(len(languages)), languages)
        axis.xaxis.tick_top()
        # Names lie flat where they fit: a letter is about 0.09 inches wide.
        room = (width / len(found) - 0.6) / len(teachers)
        names = [_title(name, 20) for name in teachers]
        flat = 0.09 * max(map(len, names)) < room
        axis.set_xticks(
            range(len(teachers)),
            names,
            rotation=0 if flat else 35,
            ha="center" if flat else "left",
            rotation_mode="anchor",
        )
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
    return _svg(figure, "Teacher weights and margins per language"), caption


def _adaptive_picture(run: Run) -> tuple[str, str] | None:
    """A small picture per language: importance of its teachers and weight of the language over the steps."""
    lines: dict[str, dict[str, dict[float, float]]] = {}
    for entry in run.log:
        for teacher, row in entry.get("teacher_importance", {}).items():
            for code, value in row.items():
                lines.setdefault(code, {}).setdefault(teacher, {})[entry["step"]] = value
        for code, value in entry.get("language_weight", {}).items():
            lines.setdefault(code, {}).setdefault("", {})[entry["step"]] = value
    codes = [code for code in run.metrics["languages"] if code in lines]
    if not codes:
        return None
    styles = {name.removeprefix(TEACHER): color for name, (color, _) in _teacher_styles(run.metrics).items()}
    columns = min(5, len(codes))
    rows = math.ceil(len(codes) / columns)
    figure = Figure(figsize=(_WIDTH * max(columns, 3) / 5, 0.9 + 1.35 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat
    handles: dict[str, Any] = {}
    for axis, code in zip(grid, codes, strict=False):
        for name, values in lines[code].items():
            style = {"color": styles.get(name, _TEACHERS[0]), "linewidth": 1.5}
            if not name:
                style = {"color": _INK, "linewidth": 1.2, "linestyle": "--"}
            (handles[_title(name) or "weight of the language"],) = axis.plot(
                sorted(values), [values[step] for step in sorted(values)], **style
            )
        axis.set_title(code)
        axis.set_ylim(bottom=0)
        axis.set_xlim(left=0)
    for axis in grid:
        axis.set_visible(False)
    figure.supxlabel("step", fontsize=10)
    figure.legend(list(handles.values()), list(handles), loc="outside upper left", ncols=min(4, len(handles)))
    caption = "Importance of each teacher in a language; the importances of a language add up to 1."
    if "weight of the language" in handles:
        caption += " Dashed: the weight of the language in the loss, 1 on average over the rows."
    return _svg(figure, "Adaptive strategy over training steps"), caption


def _tiles(run: Run) -> str:
    """The headline figures."""
    metrics, tiles = run.metrics, []
    languages = metrics["languages"]
    means = {
        name: _mean(_accuracy(metrics, name, code) for code in languages)
        for name in (STUDENT, BASELINE)
        if name in metrics["test"]
    }
    plural = "language" if len(languages) == 1 else f"{len(languages)} languages"
    tiles.append((f"{_plain(_Cell(means[STUDENT]))} %", "student", f"mean accuracy, {plural}"))
    if BASELINE in means:
        gain = _plain(_Cell(_difference(means[STUDENT], means[BASELINE]), signed=True))
        note = f"student {gain} points"
        tiles.append((f"{_plain(_Cell(means[BASELINE]))} %", "labels only", note))
    teachers = list(_teacher_styles(metrics))
    best = []
    for code in languages:
        known = [_accuracy(metrics, name, code) for name in teachers]
        best.append(max((value for value in known if value is not None), default=None))
    if any(value is not None for value in best):
        taught = sum(value is not None for value in best)
        note = "the best one of each language"
        note += "" if taught == len(languages) else f", {taught} of {len(languages)}"
        tiles.append((f"{_plain(_Cell(_mean(best)))} %", "teachers", note))
    sizes = metrics.get("sizes", {})
    if STUDENT in sizes:
        others = [size for name, size in sizes.items() if name != STUDENT]
        note = f"the teachers together {_count(sum(others))}" if others else "of the student"
        tiles.append((_count(sizes[STUDENT]), "parameters", note))
    if "total" in metrics.get("seconds", {}):
        tiles.append((_duration(metrics["seconds"]["total"]), "wall time", "all together"))
    return "".join(
        f"<li><strong>{_esc(value)}</strong><span>{_esc(name)}</span><small>{_esc(note)}</small></li>"
        for value, name, note in tiles
    )


def _count(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}\u00a0{unit}"
    return f"{number:g}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def _esc(text: object) -> str:
    return html.escape(str(text))


def _table(run: Run) -> str:
    header, rows = _accuracy_rows(run.metrics)

    def cell(value: str | _Cell, tag: str) -> str:
        text = _esc(_plain(value))
        bold = isinstance(value, _Cell) and value.best
        return f"<{tag}>{f'<b>{text}</b>' if bold else text}</{tag}>"

    def line(row: Sequence[str | _Cell]) -> str:
        first = f'<th scope="row">{_esc(_plain(row[0]))}</th>'
        return f"<tr>{first}{''.join(cell(value, 'td') for value in row[1:])}</tr>"

    head = "".join(f'<th scope="col">{_esc(name)}</th>' for name in header)
    return (
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(map(line, rows[:-1]))}</tbody>"
        f"<tfoot>{line(rows[-1])}</tfoot></table>"
    )


def _pairs(items: Mapping[str, Any], show: Callable[[Any], str] = str) -> str:
    cells = (f"<dt>{_esc(name)}</dt><dd>{_esc(show(value))}</dd>" for name, value in items.items())
    return f"<dl>{''.join(cells)}</dl>"


def _page(run: Run) -> str:
    metrics = run.metrics
    with mpl.rc_context(_RC):
        pictures = [_accuracy_picture(run), _loss_picture(run), _weight_picture(run), _adaptive_picture(run)]
    figures = [
        f'<figure><div class="wide">{svg}</div><figcaption>{_esc(caption)}</figcaption></figure>'
        for svg, caption in (picture for picture in pictures if picture is not None)
    ]
    titles = [
        name
        for name, picture in zip(
            ("Accuracy per language", "Training", "Teachers", "Adaptive strategy"), pictures, strict=True
        )
        if picture is not None
    ]
    sections = [f"<section><h2>{name}</h2>{figure}</section>" for name, figure in zip(titles, figures, strict=True)]
    note = "Accuracy on the test split in per cent"
    note += ", the best of each language in bold." if len(metrics["test"]) > 1 else "."
    if BASELINE in metrics["test"]:
        note += " Gain is student minus labels only, in points."
    if _teacher_styles(metrics):
        note += " The mean of a teacher is over the languages that it teaches."
    sections.insert(
        1,
        f'<section><h2>Table</h2><div class="wide">{_table(run)}</div><p class="note">{_esc(note)}</p></section>',
    )
    if metrics.get("seconds"):
        sections.append(f"<section><h2>Time</h2>{_pairs(metrics['seconds'], _duration)}</section>")
    taught = {_title(name): ", ".join(codes) for name, codes in metrics.get("teacher_languages", {}).items()}
    if taught:
        sections.append(f"<section><h2>Languages of the teachers</h2>{_pairs(taught)}</section>")
    if metrics.get("label_names"):
        labels = ", ".join(map(str, metrics["label_names"]))
        sections.append(f"<section><h2>Labels</h2><p>{_esc(labels)}</p></section>")
    if run.config is not None:
        sections.append(f"<section><h2>Settings</h2><pre>{_esc(run.config)}</pre></section>")
    machine = {"machine": metrics["machine"]} if metrics.get("machine") else {}
    versions = {**machine, **metrics.get("versions", {})}
    if versions:
        sections.append(f"<section><h2>Machine and versions</h2>{_pairs(versions)}</section>")
    task = metrics.get("task", run.path.resolve().name)
    created = f"<p>{_esc(metrics['created'])}</p>" if metrics.get("created") else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        # The browser itself keeps the promise that nothing is loaded.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{_esc(task)} | amtss_fast</title><style>{_CSS}</style></head><body>"
        f'<header><h1>{_esc(task)}</h1>{created}</header><ul class="tiles">{_tiles(run)}</ul>\n'
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


_LIGHT = """--ink:#1b2430;--muted:#7b8794;--grid:#d5dbe1;--paper:#ffffff;--card:#f4f6f8;
--student:#0b62b8;--baseline:#d1570a;--hot:#7db4e6;--cold:#f0a576;--teacher0:#0a8a66;
--teacher1:#a24a9c;--teacher2:#a57a00;--teacher3:#5b6770;--teacher4:#b3304f;"""
_DARK = """--ink:#e4e9ee;--muted:#8d99a6;--grid:#38424d;--paper:#12171d;--card:#1b222a;
--student:#58a8f5;--baseline:#f58a42;--hot:#2868a8;--cold:#a2541c;--teacher0:#3ccf9f;
--teacher1:#d68ad0;--teacher2:#e0b53a;--teacher3:#a9b6c2;--teacher4:#f2758f;"""
_CSS = f"""
:root{{color-scheme:light dark;{_LIGHT}}}
@media (prefers-color-scheme:dark){{:root{{{_DARK}}}}}
body{{margin:0 auto;padding:2rem 1.25rem 4rem;max-width:60rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}}
h1{{margin:0;font-size:1.7rem;line-height:1.2;overflow-wrap:anywhere}}
h2{{margin:2.5rem 0 .75rem;font-size:1.15rem}}
header p,figcaption,.note,small{{margin:.4rem 0 0;color:var(--muted);font-size:.875rem}}
.tiles{{display:grid;grid-template-columns:repeat(auto-fill,minmax(10rem,1fr));gap:.75rem;margin:1.5rem 0 0;
padding:0;list-style:none}}
.tiles li{{padding:.8rem 1rem;border-radius:.5rem;background:var(--card);overflow-wrap:anywhere}}
.tiles strong,.tiles span,.tiles small{{display:block}}
.tiles strong{{font-size:1.5rem;line-height:1.2;font-variant-numeric:tabular-nums}}
figure{{margin:0}}
.wide{{overflow-x:auto}}
.wide svg{{display:block;width:calc(100%*var(--w));min-width:calc(38rem*var(--w));height:auto}}
table{{border-collapse:collapse;font-variant-numeric:tabular-nums}}
th,td{{padding:.25rem .9rem;text-align:right;white-space:nowrap}}
th:first-child{{padding-left:0;text-align:left}}
th{{font-weight:500}}
thead th{{border-bottom:1px solid var(--muted);color:var(--muted);font-size:.875rem}}
tbody tr+tr>*{{border-top:1px solid var(--grid)}}
tfoot tr>*{{border-top:1px solid var(--muted)}}
b{{font-weight:700}}
dl{{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1.25rem;margin:0}}
dt{{color:var(--muted)}}
dd{{margin:0;overflow-wrap:anywhere}}
pre{{margin:0;padding:1rem;border-radius:.5rem;background:var(--card);overflow-x:auto;
font:.8125rem/1.5 ui-monospace,monospace}}
@media print{{:root{{color-scheme:light;{_LIGHT}}}body{{max-width:none;padding:0;font-size:11pt}}
figure,table,.tiles{{break-inside:avoid}}h2{{break-after:avoid}}pre{{white-space:pre-wrap}}
.wide{{overflow:visible}}th,td{{padding:.15rem .45rem;font-size:9pt}}
.tiles{{grid-template-columns:repeat(5,1fr)}}.tiles strong{{font-size:14pt}}
.tiles li,pre,svg *{{print-color-adjust:exact}}}}
"""
