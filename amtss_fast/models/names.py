"""Checks of what a user names: languages, texts and labels."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

from amtss_fast.errors import UserError


def check_languages(languages: Sequence[str] | None) -> list[str]:
    """The language codes as a new list.

    Raises:
        TypeError: not a sequence of strings.
        UserError: no code, an empty code, or a code that stands there twice.
    """
    if languages is None or isinstance(languages, str) or not isinstance(languages, Iterable):
        raise TypeError(f"languages must be a list of language codes, got {languages!r}")
    codes = list(languages)
    if not all(isinstance(code, str) for code in codes):
        raise TypeError(f"languages must be strings, got {codes!r}")
    if not codes or not all(code.strip() for code in codes):
        raise UserError(f"languages must hold at least one code and no empty one, got {codes!r}")
    plain = [normalize_language(code) for code in codes]
    twice = sorted({code for code, key in zip(codes, plain, strict=True) if plain.count(key) > 1})
    if twice:
        raise UserError(f"languages must be different, got {', '.join(twice)} twice in {show_names(codes)}")
    return codes


def check_code(code: str) -> str:
    """The language code.

    Raises:
        UserError: a character that cannot be in one: a code becomes part of a folder's name and of a name in the log.
    """
    if not re.fullmatch(r"[\w-]+", code):
        raise UserError(f"a language code consists of letters, digits, - and _, got {code!r}")
    return code


def check_texts(texts: Sequence[str], text_pairs: Sequence[str] | None) -> tuple[list[str], list[str] | None]:
    """The texts, and the second text of each if there are any, as lists of one length.

    Raises:
        TypeError: a bare string, or an entry that is no string.
        UserError: unequal lengths.
    """
    first = _strings("texts", texts)
    if text_pairs is None:
        return first, None
    second = _strings("text_pairs", text_pairs)
    if len(second) != len(first):
        raise UserError(f"text_pairs must have one entry per text ({len(first)}), got {len(second)}")
    return first, second


def normalize_label(name: str) -> str:
    """A label name as it is compared with others: without case and outer blanks, characters composed (NFC)."""
    # Letters that differ in case alone may be composed differently.
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", str(name)).strip().casefold())


def normalize_language(code: str) -> str:
    """A language code as it is compared with others: as a label name, with `_` for `-`."""
    return normalize_label(code).replace("-", "_")


def show_names(names: Iterable[str], known: Iterable[str] = ()) -> str:
    """Names as a list for a message, those that are not `known` with their characters beyond ASCII escaped.

    Two names may look the same and differ: in the form of an accent, or by a letter of another alphabet.
    """
    same = {normalize_label(name) for name in known}
    shown = [
        f"{name!r} ({name!a})" if not str(name).isascii() and normalize_label(name) not in same else repr(name)
        for name in names
    ]
    return f"[{', '.join(shown)}]"


def _strings(argument: str, values: Sequence[str]) -> list[str]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{argument} must be a list of strings, got {values!r}")
    entries = list(values)
    wrong = [entry for entry in entries if not isinstance(entry, str)]
    if wrong:
        raise TypeError(f"{argument} must be strings, got {wrong[0]!r}")
    return entries
