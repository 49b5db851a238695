"""The pictures of the docs are those of the committed figures, and those that the library computes."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[2]


def test_the_picture_is_drawn_from_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    pictures = importlib.import_module("pictures")
    figures = json.loads(pictures.FIGURES.read_text(encoding="utf-8"))
    drawn = pictures.draw(figures)
    assert pictures.PICTURE.read_text(encoding="utf-8") == drawn, "run `python benchmarks/pictures.py`"

    shown = {text.text for text in ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")}
    for row in figures["rows"]:
        if row["rival"] != "native":
            assert f"{row['times_native']:.1f}\N{MULTIPLICATION SIGN}" in shown, row


@pytest.mark.parametrize("name", ["divergence_fits.svg", "divergence_gradients.svg"])
def test_the_picture_is_what_the_library_computes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    pictures = importlib.import_module("divergence_pictures")
    drawn = pictures.FILES[name]()
    committed = (pictures.PICTURES / name).read_text(encoding="utf-8")
    assert committed == drawn, "run `python benchmarks/divergence_pictures.py`"
