"""Scalars of a configuration: kept as they were written until their place says what they are.

YAML reads the language `no` as False, the label `01` as 1 and a revision like 2024-01-01 as a date. Here an unquoted
scalar stays a text; :func:`typed` makes of it what the field that it stands in expects.
"""

from __future__ import annotations

import re
import types
from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin

_NULL = ("", "~", "null", "Null", "NULL")
_TRUE = ("true", "yes", "on")
_FALSE = ("false", "no", "off")
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+")
_DECIMAL = re.compile(
    r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|"
    r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
# Python converts no longer ones without being told to.
_LONGEST = 4000


class Written(str):
    """An unquoted scalar, as it was written."""

    __slots__ = ()


def core_value(value: Any) -> Any:
    """The value with each unquoted scalar in it as YAML 1.2 has it.

    `true` and `false` are the booleans, `null`, `~` and nothing are None; 1, 1_000 and 0x1F are integers, 1e5 and .inf
    numbers; `no`, 017, 0o17, 1:30 and dates are texts.
    """
    if isinstance(value, Mapping):
        return {key: core_value(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [core_value(entry) for entry in value]
    return _core(value) if isinstance(value, Written) else value


def typed(value: Any, wanted: Any) -> Any:
    """The value with its unquoted scalars as the type `wanted` expects them.

    What does not fit stays a text, for the message about it. A mapping of anything, or a section, is left as it is.
    """
    kinds = _alternatives(wanted)
    if isinstance(value, Written):
        return _scalar(value, kinds)
    if isinstance(value, bool) and bool not in kinds and (int in kinds or float in kinds):
        # To Python, True is the number 1.
        return str(value).lower()
    for kind in kinds:
        origin, arguments = get_origin(kind), get_args(kind)
        if isinstance(value, list) and origin is list:
            return [typed(entry, arguments[0]) for entry in value]
        if isinstance(value, Mapping) and origin is dict and arguments[1] is not Any:
            return {key: typed(entry, arguments[1]) for key, entry in value.items()}
    return value


def _alternatives(wanted: Any) -> list[Any]:
    """The types of which a value may have any."""
    origin = get_origin(wanted)
    if origin is Annotated:
        return _alternatives(get_args(wanted)[0])
    if origin in (Union, types.UnionType):
        return [kind for part in get_args(wanted) for kind in _alternatives(part)]
    return [wanted]


def _scalar(text: Written, kinds: list[Any]) -> Any:
    core, word = _core(text), text.lower()
    if core is None and (types.NoneType in kinds or not text):
        return None
    if bool in kinds and word in (*_TRUE, *_FALSE):
        return word in _TRUE
    if isinstance(core, (int, float)) and not isinstance(core, bool) and (int in kinds or float in kinds):
        whole = float not in kinds and isinstance(core, float) and core.is_integer()
        return int(core) if whole else core
    takes_text = any(
        get_origin(kind) is Literal or (isinstance(kind, type) and issubclass(kind, Enum)) for kind in kinds
    )
    # A text keeps that it had no quotes: a path looks at it.
    return str(text) if takes_text and str not in kinds else text


def _core(text: str) -> Any:
    if text in _NULL:
        return None
    if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return text.lower() == "true"
    if len(text) < _LONGEST:
        if _INTEGER.fullmatch(text):
            return int(text, 16) if text.startswith("0x") else int(text)
        if _DECIMAL.fullmatch(text):
            return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
    return str(text)
