"""The files of a run folder."""

from __future__ import annotations

from amtss_fast.runs.folder import nest


def test_nest() -> None:
    assert nest({"step": 1, "w/a/en": 0.5, "w/b/en": 0.25}) == {"step": 1, "w": {"a": {"en": 0.5}, "b": {"en": 0.25}}}
