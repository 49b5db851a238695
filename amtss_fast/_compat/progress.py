"""Bars that show progress."""

from __future__ import annotations

import sys


def close_bars() -> None:
    """Ends the lines of all open bars of tqdm, so that what is printed next starts a line."""
    tqdm = sys.modules.get("tqdm")
    for bar in list(tqdm.tqdm._instances) if tqdm is not None else ():
        bar.close()
