"""`amtss-fast predict`."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from amtss_fast.cli.common import inference_device, positive
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="the folder of a run, or of a saved student")
    parser.add_argument("file", nargs="?", help="one text per line (default: standard input)")
    parser.add_argument("--language", help="the language of the texts that do not give one")
    parser.add_argument(
        "--jsonl",
        action="store_true",
        help='lines are JSON: {"text": ..., "language": ..., "text_pair": ...}; language and text_pair may be left out',
    )
    parser.add_argument("--batch-size", type=positive, default=32, help="texts per forward pass (default: %(default)s)")


def run(options: argparse.Namespace) -> None:
    student = _load_student(options.run)
    # Sorting by length needs many rows at once; the first answers should not wait for all of them.
    for rows in _chunks(_read_rows(options), 32 * options.batch_size):
        for row, prediction in zip(rows, _predict(student, rows, options.batch_size), strict=True):
            print(json.dumps(_answer(row, prediction), ensure_ascii=False), flush=True)


def _load_student(folder: Path) -> AMTSSForSequenceClassification:
    from transformers import AutoConfig

    from amtss_fast.models import AMTSSConfig, AMTSSForSequenceClassification

    if (folder / "student").is_dir():
        folder = folder / "student"
    with user_errors():
        model_type = AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type
        if model_type != AMTSSConfig.model_type:
            raise UserError(f"predict is for classifiers, {folder} holds a model of type {model_type!r}")
        return AMTSSForSequenceClassification.from_pretrained(folder, device_map=inference_device())


def _read_rows(options: argparse.Namespace) -> Iterator[_Row]:
    with user_errors():
        source = sys.stdin if options.file is None else open(options.file, encoding="utf-8")  # noqa: SIM115
        with source:
            for number, line in enumerate(source, 1):
                yield _read_row(line, number, options)


def _read_row(line: str, number: int, options: argparse.Namespace) -> _Row:
    row: Any = {"text": line.rstrip("\n")}
    if options.jsonl:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"line {number} is not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise UserError(f'line {number}: expected {{"text": ...}}, found {line.strip()[:80]}')
    language = row.get("language") or options.language
    if language is None:
        raise UserError(f"line {number}: no language; pass --language, or give one in each JSON line")
    return _Row(row["text"], row.get("text_pair"), language)


def _chunks(rows: Iterator[_Row], size: int) -> Iterator[list[_Row]]:
    while chunk := list(itertools.islice(rows, size)):
        yield chunk


def _predict(student: AMTSSForSequenceClassification, rows: Sequence[_Row], batch_size: int) -> list[Prediction]:
    pairs = [row.text_pair for row in rows if row.text_pair is not None]
    if pairs and len(pairs) < len(rows):
        raise UserError("either every row has a text_pair or none has")
    return student.predict(
        [row.text for row in rows],
        [row.language for row in rows],
        text_pairs=pairs or None,
        batch_size=batch_size,
    )


def _answer(row: _Row, prediction: Prediction) -> dict[str, Any]:
    return {
        **{name: value for name, value in row._asdict().items() if value is not None},
        "label": prediction.label,
        "score": round(prediction.score, 6),
        "probabilities": {name: round(value, 6) for name, value in prediction.probabilities.items()},
    }
