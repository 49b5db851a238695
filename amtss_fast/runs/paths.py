"""Paths of a configuration."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import BeforeValidator

from amtss_fast.errors import UserError
from amtss_fast.runs.scalars import Written, core_value


def expand_path(path: str) -> str:
    """The path with the home folder in the place of `~` or `~name`.

    Raises:
        UserError: no path, or a home folder that there is not.
    """
    if not path.strip():
        raise UserError("must be a path, it is empty")
    if isinstance(path, Written) and core_value(path) is None:
        raise UserError(f"must be a path; a file of this name needs quotes, '{path}'")
    if "\0" in path:
        raise UserError("must be a path, it has a NUL character")
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise UserError(f"there is no home folder {expanded.partition('/')[0]}; a file of this name is ./{path}")
    return expanded


def _expand(value: object) -> object:
    # Other types are pydantic's to refuse.
    return expand_path(value) if isinstance(value, str) else value


PathText = Annotated[str, BeforeValidator(_expand)]
"""A path, or the name of something on the Hub; `~` is the home folder."""
