"""Counts what came of random examples; `make fuzz` prints the table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import event

RIGHT = "right"

# (function or reader, outcome) -> number of examples.
COUNTS: Counter[tuple[str, str]] = Counter()


def outcome(what: str, how: str = RIGHT) -> None:
    """Notes one example of the function or reader `what`: right, or the error that it was refused with."""
    COUNTS[what, how] += 1
    event(f"{what}: {how}")


@contextmanager
def documented(what: str, errors: type[Exception] | tuple[type[Exception], ...], *names: str) -> Iterator[None]:
    """A body that is right, or raises one of `errors` with one of `names` in its message; counts it."""
    try:
        yield
    except errors as error:
        if not any(name in str(error) for name in names):
            raise AssertionError(f"none of {names} is named in {error!r}") from error
        outcome(what, type(error).__name__)
    else:
        outcome(what)


def table() -> list[str]:
    """The counts, a line for each function or reader."""
    rows: dict[str, Counter[str]] = {}
    for (what, how), number in sorted(COUNTS.items()):
        rows.setdefault(what, Counter())[how] += number
    width = max((len(what) for what in rows), default=0)
    return [
        f"{what:{width}}  {sum(hows.values()):>8}  "
        + ", ".join(f"{how} {number}" for how, number in hows.most_common())
        for what, hows in rows.items()
    ]
