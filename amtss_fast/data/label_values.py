"""What one label value means, whatever file or Arrow type it was read from."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from amtss_fast.errors import UserError
from amtss_fast.loss.options import UNLABELED_INDEX
from amtss_fast.models.names import normalize_label

UNLABELED = str(UNLABELED_INDEX)
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
# What programs write for a missing number. Among ids these can mean nothing else; among names they are names.
_NO_NUMBER = ("nan", "none", "null", "na", "n/a", "<na>", "nat")
# Those that nobody calls a class, and that a program wrote.
_WRITTEN = ("nan", "NaN", "<NA>", "NaT")
# Above it a float does not show every integer.
_LARGEST = 2**53


def label_text(value: Any) -> str | None:
    """A label as text, without outer blanks and in Unicode form NFC; None where it is missing (None, NaN, "")."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value.strip()) or None
    if isinstance(value, (bool, int)):
        return str(int(value))
    if isinstance(value, Decimal) and value.is_finite() and value == value.to_integral_value():
        return str(int(value))
    return _whole(repr(float(value))) or str(value)


def label_key(text: str) -> str:
    """What labels are compared by: case, outer blanks, Unicode form and the decimals of whole numbers do not count."""
    return _whole(text.strip()) or normalize_label(text)


def is_number(text: str) -> bool:
    """Whether a label is a number, whole or not."""
    return _NUMBER.fullmatch(text) is not None


def is_id(text: str) -> bool:
    """Whether a label is a whole number, or a word for a missing one."""
    return _whole(text) is not None or text.casefold() in _NO_NUMBER


def as_id(text: str) -> int:
    """The class id of a label that :func:`is_id`; -1 for a missing one."""
    whole = _whole(text)
    return UNLABELED_INDEX if whole is None else int(whole)


def different_keys(names: Sequence[str], what: str) -> dict[str, int]:
    """{key: place} of label names. Raises UserError for two that are one name, and shows the difference."""
    places: dict[str, int] = {}
    for place, name in enumerate(names):
        other = places.setdefault(label_key(name), place)
        if other != place:
            shown = f"{names[other]!a} and {name!a}"
            if names[other] == name:
                raise UserError(f"a name twice in {what}: {name!r} in {list(names)}")
            raise UserError(
                f"a name twice in {what}, {shown}: "
                "case, outer blanks, Unicode form and decimals do not make another name"
            )
    return places


def check_names_found(names: Sequence[str], what: str) -> None:
    """Checks label names that stand in the data alone.

    Raises:
        UserError: two that are one name, or names that a program wrote for a missing label.
    """
    different_keys(names, what)
    written = [name for name in names if name in _WRITTEN]
    if written:
        raise UserError(
            f"{what} are names, and {written} among them; leave a missing label empty, or give label_names that have "
            "it if it is a class"
        )
    if names and all(map(is_number, names)):
        shown = [name for name in names if not is_id(name)]
        raise UserError(f"{what} are numbers, but no ids 0, 1, ...: {shown[:10]}; if they are names, give label_names")


def _whole(text: str) -> str | None:
    """The integer that a text like "1", "1.0" or "1e0" stands for, as digits; None for any other text."""
    if not is_number(text):
        return None
    number = float(text)
    if number.is_integer() and abs(number) < _LARGEST:
        return str(int(number))
    return None
