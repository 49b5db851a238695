"""Pictures as SVG elements of the page, in its colors."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

from markupsafe import Markup
from matplotlib.figure import Figure

from amtss_fast.runs.report.table import tested_teachers

# Placeholders of colors. The page replaces them by variables, so that one picture fits light and dark.
INK, MUTED, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
STUDENT_COLOR, BASELINE_COLOR, POSITIVE, NEGATIVE = "#050505", "#060606", "#070707", "#080808"
TEACHER_COLORS = ("#090909", "#0a0a0a", "#0b0b0b", "#0c0c0c", "#0d0d0d")
_VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    PAPER: "paper",
    STUDENT_COLOR: "student",
    BASELINE_COLOR: "baseline",
    POSITIVE: "positive",
    NEGATIVE: "negative",
    **{color: f"teacher{n}" for n, color in enumerate(TEACHER_COLORS)},
}
_MARKERS = ("D", "s", "^", "v", "P", "X", "p", "h")

WIDTH = 9.0
"""Inches of a picture that is as wide as the page."""

RC: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "amtss_fast",
    # A "$" in a name is a dollar.
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
}
"""Settings of matplotlib for all pictures."""


class Picture(NamedTuple):
    """A picture, the heading above it and the caption below."""

    heading: str
    svg: Markup
    caption: str


def to_svg(figure: Figure, title: str) -> Markup:
    """The figure as an SVG element whose colors are variables of the page."""
    buffer = io.StringIO()
    # Without metadata there is no date and no foreign address in the file.
    empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with warnings.catch_warnings():
        # The reader's fonts draw the text, so that letters which this font lacks do not matter.
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
    share = figure.get_figwidth() / WIDTH
    # matplotlib has escaped the texts in the body.
    return Markup(
        f'<svg style="--w:{share:.3f}" viewBox="{box}" role="img" aria-label="{html.escape(title)}">{body.strip()}'
    )


def teacher_styles(metrics: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Color and marker of each teacher, the same in the whole page."""
    names = tested_teachers(metrics)
    return {
        name: (TEACHER_COLORS[n % len(TEACHER_COLORS)], _MARKERS[n % len(_MARKERS)]) for n, name in enumerate(names)
    }
