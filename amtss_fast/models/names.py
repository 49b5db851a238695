"""Checks of what a user names: languages, texts and labels."""

from __future__ import annotations

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
    twice = sorted({code for code in codes if codes.count(code) > 1})
    if twice:
        raise UserError(f"languages must be different, got {', '.join(twice)} twice in {codes!r}")
    return codes


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
    """A label name as it is compared with others: without case and outer blanks."""
    return str(name).strip().casefold()


def _strings(argument: str, values: Sequence[str]) -> list[str]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{argument} must be a list of strings, got {values!r}")
    entries = list(values)
    wrong = [entry for entry in entries if not isinstance(entry, str)]
    if wrong:
        raise TypeError(f"{argument} must be strings, got {wrong[0]!r}")
    return entries
