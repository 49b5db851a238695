"""Lines of text, and rows of JSON in them, read strictly: what is broken is an error that names file and line."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from amtss_fast.errors import UserError


def read_lines(source: Path | BinaryIO, origin: str, *, newline: str | None = None) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their numbers from 1; lines end in LF, CRLF or CR. A BOM is dropped.

    Args:
        source: the file; a stream is not closed.
        origin: what messages call it.
        newline: as of `open`; None: every line end becomes LF.

    Raises:
        UserError: a line that is not UTF-8, or that has a NUL byte (as UTF-16 has).
    """
    stream: BinaryIO = source.open("rb") if isinstance(source, Path) else source
    # Strict decoding would fail for a whole block and not say in which line; here the wrong bytes become surrogates.
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline=newline)
    try:
        for number, line in enumerate(text, 1):
            check_line(line, f"{origin}, line {number}")
            yield number, line
    finally:
        if isinstance(source, Path):
            text.close()
        else:
            text.detach()


def check_line(line: str, place: str) -> None:
    """Raises UserError for a line with a NUL, or with what is no UTF-8."""
    if "\0" in line:
        raise UserError(f"{place} has a NUL byte; is the file UTF-16? Save it as UTF-8")
    if line.isascii():
        return
    try:
        line.encode()
    except UnicodeEncodeError as error:
        byte = f"byte 0x{ord(line[error.start]) & 0xFF:02x}, character {error.start + 1}"
        raise UserError(f"{place} is not UTF-8 ({byte}); save the file as UTF-8") from error


def json_row(line: str, place: str) -> dict[str, Any]:
    """The object in a line of JSON.

    Raises:
        UserError: the line is no JSON or no object, has a key twice, Infinity, or half of a surrogate pair.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise UserError(f"{place} has the key {twice!r} twice")
        return found

    try:
        row = json.loads(line, object_pairs_hook=once, parse_constant=lambda value: _constant(value, place))
        # Only an escape gives half a pair, as the line itself was UTF-8.
        if "\\u" in line:
            json.dumps(row, ensure_ascii=False).encode()
    except UserError:
        raise
    except UnicodeEncodeError as error:
        raise UserError(f"{place} has half of a surrogate pair, which is no character: {_shown(line)}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is not JSON: {error}; found {_shown(line)}") from error
    if not isinstance(row, dict):
        raise UserError(f"{place} is not a JSON object (one object per line is expected): {_shown(line)}")
    return row


def json_rows(lines: Iterable[tuple[int, str]], origin: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of JSON lines with the numbers of their lines; blank lines are skipped."""
    return ((number, json_row(line, f"{origin}, line {number}")) for number, line in lines if line.strip())


def _constant(value: str, place: str) -> float:
    if value != "NaN":
        raise UserError(f"{place} has {value}, which is no JSON")
    # Python writes a missing label so.
    return float("nan")


def _shown(line: str) -> str:
    return repr(line.strip()[:80])
