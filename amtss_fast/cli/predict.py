"""`amtss-fast predict`."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from amtss_fast.cli.common import inference_device, path, positive
from amtss_fast.errors import UserError, user_errors

if TYPE_CHECKING:
    from amtss_fast.models import AMTSSForSequenceClassification, Prediction

SUMMARY = "classify texts, and print one line of JSON for each"
DETAILS = """examples:
  echo 'a red apple' | amtss-fast predict runs/demo --language en
  amtss-fast predict runs/demo --jsonl texts.jsonl"""


class _Row(NamedTuple):
    text: str
    text_pair: str | None
    language: str
    place: str
    """The file and the line, for messages."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=path, help="the folder of a run, or of a saved student")
    parser.add_argument(
        "file", nargs="?", type=path, help="one text per line, UTF-8; blank lines are skipped (default: standard input)"
    )
    parser.add_argument("--language", help="the language of the texts that do not give one")
    parser.add_argument(
        "--jsonl",
        action="store_true",
        help='lines are JSON: {"text": ..., "language": ..., "text_pair": ...}; language and text_pair may be left out',
    )
    parser.add_argument("--batch-size", type=positive, default=32, help="texts per forward pass (default: %(default)s)")


def run(options: argparse.Namespace) -> None:
    student = _load_student(options.run)
    languages = student.config.languages
    if options.language is not None and options.language not in languages:
        raise UserError(f"--language {options.language}: the student has the languages {', '.join(languages)}")
    # JSON is UTF-8 or ASCII, whatever the terminal is.
    ascii_only = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
    # Sorting by length needs many rows at once; the first answers should not wait for all of them.
    for rows in _chunks(_read_rows(options, languages), 32 * options.batch_size):
        for row, prediction in zip(rows, _predict(student, rows, options.batch_size), strict=True):
            if not math.isfinite(prediction.score):
                raise UserError(f"{options.run}: the student's output is not finite for the text of {row.place}")
            print(_as_line(_answer(row, prediction), ascii_only), flush=True)


def _load_student(folder: Path) -> AMTSSForSequenceClassification:
    from amtss_fast.models import AMTSSConfig, AMTSSForSequenceClassification
    from amtss_fast.models.places import read_model_config

    if (folder / "student").is_dir():
        folder = folder / "student"
    if not folder.exists():
        raise FileNotFoundError(f"there is no run and no student in {folder}")
    model_type = read_model_config(folder, whose="student").model_type
    if model_type != AMTSSConfig.model_type:
        raise UserError(f"predict is for classifiers, {folder} holds a model of type {model_type!r}")
    student: AMTSSForSequenceClassification = AMTSSForSequenceClassification.from_pretrained(
        folder, device_map=inference_device()
    )
    return student


def _read_rows(options: argparse.Namespace, languages: Sequence[str]) -> Iterator[_Row]:
    """The texts, blank lines skipped. Either all of them have a second text, or none has."""
    first: _Row | None = None
    for line, place in _lines(options.file):
        if not line.strip():
            continue
        row = _read_row(line, place, options)
        if row.language not in languages:
            raise UserError(f"{place}: the student has no language {row.language!r}, it has {', '.join(languages)}")
        first = first or row
        if (row.text_pair is None) != (first.text_pair is None):
            raise UserError(f"either every row has a text_pair or none has: {first.place} and {place} differ")
        yield row


def _lines(file: Path | None) -> Iterator[tuple[str, str]]:
    """Each line, and the words for its place."""
    from amtss_fast.data.lines import check_line, read_lines

    origin = "standard input" if file is None else str(file)
    source = file or getattr(sys.stdin, "buffer", None)
    with user_errors():
        # A standard input that somebody replaced may hold no bytes.
        for number, line in enumerate(sys.stdin, 1) if source is None else read_lines(source, origin):
            place = f"{origin}, line {number}"
            check_line(line, place)
            yield line.removesuffix("\n"), place


def _read_row(line: str, place: str, options: argparse.Namespace) -> _Row:
    from amtss_fast.data.lines import json_row

    row = json_row(line, place) if options.jsonl else {"text": line}
    if not isinstance(row.get("text"), str):
        raise UserError(f'{place}: expected {{"text": ...}}, found {line.strip()[:80]}')
    for name in ("text_pair", "language"):
        if not isinstance(row.get(name), str | None):
            raise UserError(f"{place}: {name} must be a text, found {row[name]!r}")
    language = row.get("language") or options.language
    if language is None:
        raise UserError(f"{place}: no language; pass --language, or give one in each JSON line")
    return _Row(row["text"], row.get("text_pair"), language, place)


def _chunks(rows: Iterator[_Row], size: int) -> Iterator[list[_Row]]:
    while chunk := list(itertools.islice(rows, size)):
        yield chunk


def _predict(student: AMTSSForSequenceClassification, rows: Sequence[_Row], batch_size: int) -> list[Prediction]:
    pairs = [row.text_pair for row in rows if row.text_pair is not None]
    return student.predict(
        [row.text for row in rows],
        [row.language for row in rows],
        text_pairs=pairs or None,
        batch_size=batch_size,
    )


def _answer(row: _Row, prediction: Prediction) -> dict[str, Any]:
    return {
        "text": row.text,
        **({} if row.text_pair is None else {"text_pair": row.text_pair}),
        "language": row.language,
        "label": prediction.label,
        "score": round(prediction.score, 6),
        "probabilities": {name: round(value, 6) for name, value in prediction.probabilities.items()},
    }


def _as_line(answer: Mapping[str, Any], ascii_only: bool) -> str:
    """One line of JSON, whichever characters a reader takes for line ends."""
    line = json.dumps(answer, ensure_ascii=ascii_only, allow_nan=False)
    return re.sub("[\x7f-\x9f\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", line)
