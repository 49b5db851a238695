"""Bars of tqdm."""

from __future__ import annotations

import sys

import pytest
from tqdm.auto import tqdm

from amtss_fast._compat.progress import close_bars


def test_open_bars_are_closed(capsys: pytest.CaptureFixture[str]) -> None:
    bar = tqdm(total=2, file=sys.stderr, mininterval=0)
    bar.update()
    close_bars()
    print("next", file=sys.stderr)
    assert "\nnext\n" in capsys.readouterr().err
    assert bar.disable
