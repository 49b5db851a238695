"""Draws what the divergences do, with values and gradients from `amtss_loss`.

    python benchmarks/divergence_pictures.py

writes two pictures for `docs/divergences.md`. `docs/pictures/divergence_fits.svg`: for each divergence the bell curve
that is nearest to a teacher with two peaks. `docs/pictures/divergence_gradients.svg`: how strongly each divergence
moves the logit of a class, by the ratio of the student's probability q and the teacher's p. A test compares the files
with what this draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import torch
from pictures import MARGIN, ROOT, STYLE, WIDTH
from torch import Tensor

from amtss_fast import amtss_loss
from amtss_fast.loss.options import DEFAULT_BETA, DIVERGENCES

PICTURES = ROOT / "docs" / "pictures"

# One color for each divergence, on a light and on a dark page.
COLORS = {
    "forward_kl": ("#0969da", "#4493f8"),
    "reverse_kl": ("#bc4c00", "#db6d28"),
    "jsd": ("#1a7f37", "#3fb950"),
    "skew_forward_kl": ("#8250df", "#ab7df8"),
    "skew_reverse_kl": ("#bf3989", "#db61a2"),
    "tvd": ("#57606a", "#9198a1"),
}


def _rules(scheme: int) -> str:
    return "\n".join(f".{name} {{ stroke: {colors[scheme]} }}" for name, colors in COLORS.items())


CURVES = f"""
path {{ fill: none; stroke-width: 2 }}
.dashed {{ stroke-dasharray: 5 4 }}
.teacher {{ fill: #d1d9e0 }}
{_rules(0)}
@media (prefers-color-scheme: dark) {{
  .teacher {{ fill: #3d444d }}
{_rules(1)}
}}
"""

# The classes are places on a line.
PLACES = torch.linspace(-6, 6, 61, dtype=torch.float64)


def bell(mean: float | Tensor, width: float | Tensor) -> Tensor:
    """Logits of a bell curve over the places."""
    return -(((PLACES - mean) / width) ** 2) / 2


def two_peaks() -> Tensor:
    """Logits of the teacher: 60 % of its mass around -2, 40 % around 2.4."""
    return (0.6 * bell(-2.0, 0.7).softmax(-1) + 0.4 * bell(2.4, 0.7).softmax(-1)).log()


def nearest_bell(**options: Any) -> tuple[float, float]:
    """Mean and width of the bell curve with the smallest divergence from the teacher, of all on a fine grid."""
    means = torch.arange(-80, 81, dtype=torch.float64) / 20
    widths = torch.arange(6, 81, dtype=torch.float64) / 20
    grid = torch.cartesian_prod(means, widths)
    students = bell(grid[:, :1], grid[:, 1:])
    teacher = two_peaks().expand(1, len(students), -1)
    loss = amtss_loss(students, teacher, temperature=1.0, reduction="none", **options)
    mean, width = grid[int(loss.argmin())].tolist()
    return mean, width


def push(ratios: Tensor, **options: Any) -> Tensor:
    """The gradient of the logit of a rare class, divided by the larger of p and q, for each ratio q / p.

    There is one other class, with the rest of the mass.
    """
    p = 1e-7
    q = p * ratios
    student = torch.stack([q.log(), (-q).log1p()], -1).requires_grad_()
    teacher = torch.tensor([math.log(p), math.log1p(-p)], dtype=torch.float64).expand(1, len(ratios), 2)
    amtss_loss(student, teacher, temperature=1.0, reduction="sum", **options).backward()
    assert student.grad is not None
    return student.grad[:, 0] / q.clamp(min=p)


class Picture:
    """An SVG to which shapes are added."""

    def __init__(self, title: str, height: int):
        self.svg = ElementTree.Element(
            "svg", xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {WIDTH} {height}", width=f"{WIDTH}", role="img"
        )
        self.add("title", title)
        self.add("style", STYLE + CURVES)
        self.add("rect", class_="page", width=WIDTH, height=height, rx=6)
        self.add("text", title, class_="title", x=MARGIN, y=28)

    def add(self, tag: str, text: str = "", **attributes: Any) -> None:
        names = {name.replace("class_", "class"): str(value) for name, value in attributes.items()}
        ElementTree.SubElement(self.svg, tag, names).text = text or None

    def curve(self, xs: Sequence[float], ys: Sequence[float], class_: str) -> None:
        points = " L".join(f"{x:.1f} {y:.1f}" for x, y in zip(xs, ys, strict=True))
        self.add("path", class_=class_, d=f"M{points}")

    def text(self) -> str:
        """The file."""
        ElementTree.indent(self.svg)
        return ElementTree.tostring(self.svg, encoding="unicode") + "\n"


def draw_fits() -> str:
    """The bell curves as SVG."""
    title = "A student with one peak and a teacher with two: the nearest bell curve"
    picture = Picture(title, 400)
    width, height, top = 232, 96, 76
    for number, divergence in enumerate(DIVERGENCES):
        left = MARGIN + number % 3 * (width + 16)
        bottom = top + number // 3 * 166 + height
        xs = [left + width * i / (len(PLACES) - 1) for i in range(len(PLACES))]

        def heights(logits: Tensor, bottom: int = bottom) -> list[float]:
            # Places are 0.2 apart, and no curve here is higher than 0.12.
            return [bottom - height * p / 0.12 for p in logits.softmax(-1).tolist()]

        picture.curve([xs[0], *xs, xs[-1]], [bottom, *heights(two_peaks()), bottom], "teacher")
        picture.add("line", class_="grid", x1=left, x2=left + width, y1=bottom, y2=bottom)
        name = divergence
        if divergence in DEFAULT_BETA:
            name = f"{divergence}, beta {DEFAULT_BETA[divergence]}"
        mean, deviation = nearest_bell(divergence=divergence)
        picture.curve(xs, heights(bell(mean, deviation)), divergence)
        if divergence == "jsd":
            name += " (dashed: 0.7)"
            other = nearest_bell(divergence="jsd", divergence_beta=0.7)
            picture.curve(xs, heights(bell(*other)), "jsd dashed")
        picture.add("text", name, x=left, y=bottom - height - 10)
        picture.add("text", f"mean {mean:.2f}, width {deviation:.2f}", class_="faint", x=left, y=bottom + 18)
    about = "Gray: the teacher, 60 % around -2 and 40 % around 2.4. python benchmarks/divergence_pictures.py"
    picture.add("text", about, class_="faint", x=MARGIN, y=384)
    return picture.text()


def draw_gradients() -> str:
    """The gradients as SVG."""
    title = "How strongly a class is moved: gradient of its logit / max(p, q)"
    picture = Picture(title, 470)
    left, right, top, bottom = 60, 580, 56, 400
    least, largest, span = -1.0, 2.0, 2.0

    def across(ratios: Tensor) -> list[float]:
        return [left + (right - left) * (x / span + 1) / 2 for x in ratios.log10().tolist()]

    def down(value: float) -> float:
        return bottom - (bottom - top) * (value - least) / (largest - least)

    for tick in (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0):
        picture.add("line", class_="grid", x1=left, x2=right, y1=f"{down(tick):.1f}", y2=f"{down(tick):.1f}")
        picture.add("text", f"{tick:g}", class_="number", x=left - 8, y=f"{down(tick) + 4:.1f}")
    for ratio, name in ((0.01, "1/100"), (0.1, "1/10"), (1.0, "q = p"), (10.0, "10"), (100.0, "100")):
        (at,) = across(torch.tensor([ratio], dtype=torch.float64))
        picture.add("line", class_="grid", x1=f"{at:.1f}", x2=f"{at:.1f}", y1=top, y2=bottom)
        picture.add("text", name, class_="tick", x=f"{at:.1f}", y=bottom + 18)
    ratios = torch.logspace(-span, span, 161, dtype=torch.float64)
    ends = []
    for divergence in DIVERGENCES:
        values = push(ratios, divergence=divergence)
        shown = values <= largest
        xs, ys = across(ratios[shown]), [down(value) for value in values[shown].tolist()]
        picture.curve(xs, ys, divergence)
        ends.append((ys[-1], divergence))
    label = -math.inf
    for y, divergence in sorted(ends):
        label = max(y, label + 18)
        picture.curve([right + 8, right + 22], [label, label], divergence)
        picture.add("text", divergence, x=right + 28, y=f"{label + 4:.1f}")
    picture.add(
        "text",
        "q / p of a rare class beside one other. Left: the student misses it. Right: it overrates it.",
        x=left,
        y=bottom + 40,
    )
    about = "Below 0 a step raises the logit. beta: jsd 0.5, skewed KLs 0.1. python benchmarks/divergence_pictures.py"
    picture.add("text", about, class_="faint", x=MARGIN, y=bottom + 60)
    return picture.text()


FILES = {"divergence_fits.svg": draw_fits, "divergence_gradients.svg": draw_gradients}


def main() -> None:
    for name, draw in FILES.items():
        (PICTURES / name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
