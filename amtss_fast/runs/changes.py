"""What differs between the configuration of a run and one that would continue it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from amtss_fast.runs.config import RunConfig
from amtss_fast.runs.settings import shorten

# What is trained is the same, whatever they are. A folder may have moved.
_FREE = ("output_dir", "title", "teacher_cache", "teachers_resident")
_FREE_ARGUMENTS = (
    "logging_",
    "log_",
    "report_to",
    "run_name",
    "project",
    "trackio_",
    "disable_tqdm",
    "include_num_input_tokens_seen",
    "skip_memory_metrics",
    "save_total_limit",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context",
)
_NOTHING = object()


def changes(before: RunConfig, now: RunConfig) -> list[str]:
    """A line about each setting in which what is trained differs: `data.max_length: 32 there, 16 here`."""
    old, new = before.model_dump(), now.model_dump()
    return [
        f"{key}: {_shown(there)} there, {_shown(here)} here"
        for key, there, here in _differences(old, new, ())
        if not _is_free(key.split("."))
    ]


def _differences(old: Any, new: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in {**old, **new}:
            yield from _differences(old.get(name, _NOTHING), new.get(name, _NOTHING), (*path, str(name)))
    elif isinstance(old, list) and isinstance(new, list):
        for place in range(max(len(old), len(new))):
            there, here = (values[place] if place < len(values) else _NOTHING for values in (old, new))
            yield from _differences(there, here, (*path, str(place)))
    # A number and a boolean may be equal.
    elif old != new or type(old) is not type(new):
        yield ".".join(path), old, new


def _is_free(names: list[str]) -> bool:
    if names[0] in _FREE:
        return True
    section = names[2:] if names[0] == "teachers" else names
    return (
        len(section) > 1 and section[0] in ("training", "teacher_training") and section[1].startswith(_FREE_ARGUMENTS)
    )


def _shown(value: Any) -> str:
    return "not set" if value is _NOTHING else shorten(repr(value), 60)
