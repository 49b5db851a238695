"""Draws the pictures of the docs from the committed figures.

    python benchmarks/pictures.py

writes `docs/pictures/loss_cpu.svg` from `benchmarks/results/loss_cpu.json`: for each case the time of the loss with its
gradient in plain torch and in torch.compile, divided by the time of `amtss_loss`. The same figures give the same file,
and a test compares the two.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "benchmarks" / "results" / "loss_cpu.json"
PICTURE = ROOT / "docs" / "pictures" / "loss_cpu.svg"

RIVALS = {"torch": "plain torch", "compile": "torch.compile"}
TICKS = (1, 2, 5, 10, 20, 50, 100)

WIDTH, MARGIN = 760, 16
# Columns: the case, the time of amtss_loss, then the bars with room for a number behind the longest one.
TIME_END, BARS_START, BARS_END = 318, 338, 690
FIRST_ROW, ROW_HEIGHT, BAR_HEIGHT = 102, 42, 14

# The picture brings its own background, so that it can be read on a page of any color.
STYLE = """
text { font: 13px system-ui, "DejaVu Sans", sans-serif; fill: #1f2328 }
.title { font-weight: 600; font-size: 15px }
.faint { fill: #59636e }
.number { text-anchor: end }
.tick { text-anchor: middle; fill: #59636e }
.page { fill: #ffffff }
.grid { stroke: #d1d9e0 }
.torch { fill: #bc4c00 }
.compile { fill: #0969da }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc }
  .faint, .tick { fill: #9198a1 }
  .page { fill: #0d1117 }
  .grid { stroke: #3d444d }
  .torch { fill: #db6d28 }
  .compile { fill: #4493f8 }
}
"""


def position(times: float) -> float:
    """Where a ratio lies on the logarithmic axis."""
    share = math.log(times / TICKS[0]) / math.log(TICKS[-1] / TICKS[0])
    return BARS_START + (BARS_END - BARS_START) * share


def three_digits(value: float) -> str:
    """A number with three significant digits, or all digits before the point."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}"


def describe(case: str) -> str:
    """Writes "N=32 K=3 C=250002 float32" as "32, 3, 250,002"; a dtype other than float32 stays."""
    *sizes, dtype = case.split()
    shown = [f"{int(size.partition('=')[2]):,}" for size in sizes]
    return ", ".join(shown if dtype == "float32" else [*shown, dtype])


def draw(figures: dict[str, Any]) -> str:
    """The picture as SVG, from the contents of `loss_cpu.json`."""
    rows = {(row["case"], row["rival"]): row for row in figures["rows"]}
    cases = list(dict.fromkeys(row["case"] for row in figures["rows"]))
    bottom = FIRST_ROW + ROW_HEIGHT * len(cases)
    height = bottom + 64

    svg = ElementTree.Element(
        "svg", xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {WIDTH} {height}", width=f"{WIDTH}", role="img"
    )

    def add(tag: str, text: str = "", **attributes: Any) -> None:
        names = {name.replace("class_", "class"): str(value) for name, value in attributes.items()}
        ElementTree.SubElement(svg, tag, names).text = text or None

    title = "Loss and gradient on a CPU: time relative to amtss_loss (log scale)"
    add("title", title)
    add("style", STYLE)
    add("rect", class_="page", width=WIDTH, height=height, rx=6)
    add("text", title, class_="title", x=MARGIN, y=28)
    for rival, x in zip(RIVALS, (BARS_START, BARS_START + 120), strict=True):
        add("rect", class_=rival, x=x, y=44, width=BAR_HEIGHT, height=BAR_HEIGHT)
        add("text", RIVALS[rival], x=x + BAR_HEIGHT + 6, y=56)
    add("text", "N rows, K teachers, C classes", class_="faint", x=MARGIN, y=88)
    add("text", "amtss_loss, ms", class_="faint number", x=TIME_END, y=88)

    for tick in TICKS:
        at = round(position(tick), 1)
        add("line", class_="grid", x1=at, x2=at, y1=FIRST_ROW - 8, y2=bottom)
        add("text", f"{tick}\N{MULTIPLICATION SIGN}", class_="tick", x=at, y=bottom + 18)
    for number, case in enumerate(cases):
        top = FIRST_ROW + ROW_HEIGHT * number
        middle = top + BAR_HEIGHT + 4
        add("text", describe(case), x=MARGIN, y=middle)
        add("text", three_digits(rows[case, "native"]["median_ms"]), class_="number", x=TIME_END, y=middle)
        for bar, rival in enumerate(RIVALS):
            times = rows[case, rival]["times_native"]
            y = top + bar * BAR_HEIGHT
            end = round(position(times), 1)
            add("rect", class_=rival, x=BARS_START, y=y, width=round(end - BARS_START, 1), height=BAR_HEIGHT - 1)
            add("text", f"{times:.1f}\N{MULTIPLICATION SIGN}", x=round(end + 5, 1), y=y + BAR_HEIGHT - 3)

    machine = figures["machine"]
    about = (
        f"Medians. {machine['cpu']}, {machine['instruction_set']}, {machine['threads']} threads; "
        f"torch {machine['torch']}; {machine['date'][:10]}; python benchmarks/bench_loss.py"
    )
    add("text", about, class_="faint", x=MARGIN, y=bottom + 46)
    ElementTree.indent(svg)
    return ElementTree.tostring(svg, encoding="unicode") + "\n"


def main() -> None:
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(draw(json.loads(FIGURES.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
