"""Reads the files of a run folder that the report shows, and checks them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from amtss_fast.errors import UserError
from amtss_fast.training.evaluation import STUDENT

# Bytes of a file, which is read whole.
_MOST = 1 << 30


@dataclass(frozen=True)
class RunRecord:
    """What the files of a run folder say."""

    path: Path
    metrics: dict[str, Any]
    log: list[dict[str, Any]]
    config: str | None
    """The configuration as YAML."""


def read_run(run_dir: str | Path) -> RunRecord:
    """Reads metrics.json of a run folder, and log.jsonl and config.yaml if they exist.

    Raises:
        FileNotFoundError: no metrics.json.
        UserError: a broken file; the message names it and says what is wrong.
    """
    path = Path(run_dir)
    metrics = read_metrics(path / "metrics.json")
    log = read_log(path / "log.jsonl") if (path / "log.jsonl").exists() else []
    config = None
    if (path / "config.yaml").exists():
        config = _read_text(path / "config.yaml")
        try:
            # The page shows the text. Values are not made of it, because merge keys may multiply them.
            yaml.compose(config, Loader=yaml.SafeLoader)
        except (yaml.YAMLError, RecursionError) as error:
            raise UserError(f"{path / 'config.yaml'} is not YAML: {error}") from error
    elif "config" in metrics:
        try:
            config = yaml.safe_dump(metrics["config"], sort_keys=False, allow_unicode=True)
        except RecursionError as error:
            raise UserError(f"{path / 'metrics.json'}: 'config' is nested too deep") from error
    return RunRecord(path, metrics, log, config)


def read_metrics(path: str | Path) -> dict[str, Any]:
    """Reads and checks a metrics.json; raises as :func:`read_run`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {path.parent} is not the folder of a run")
    metrics = _parse(_read_text(path), str(path))
    try:
        check_metrics(metrics)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return dict(metrics)


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Reads a log.jsonl: one object with a `step` per line; UserError names a broken line."""
    path = Path(path)
    lines = enumerate(_read_text(path).splitlines(), start=1)
    return [_log_entry(line, f"{path}, line {number}") for number, line in lines if line.strip()]


def check_metrics(metrics: Any) -> None:
    """UserError if these are not the metrics of a run."""
    if not isinstance(metrics, Mapping):
        raise UserError(f"metrics are an object, not {type(metrics).__name__}")
    for name in ("languages", "test"):
        if name not in metrics:
            raise UserError(f"no {name!r}; there are {list(metrics)}")
    languages, test = metrics["languages"], metrics["test"]
    if not isinstance(languages, list) or not all(isinstance(code, str) for code in languages):
        raise UserError(f"'languages' is a list of strings, not {languages!r}")
    # Empty: nothing was scored.
    if not isinstance(test, Mapping) or (test and STUDENT not in test):
        raise UserError(f"'test' needs the results of {STUDENT!r}; it has {list(test)}")
    for system, result in test.items():
        _check_result(system, result, languages)
    for name in ("versions", "seconds", "sizes", "teacher_languages"):
        if not isinstance(metrics.get(name, {}), Mapping):
            raise UserError(f"{name!r} is an object, not {metrics[name]!r}")
    for name in ("seconds", "sizes"):
        for key, value in metrics.get(name, {}).items():
            if not is_number(value) or not math.isfinite(value):
                raise UserError(f"{name!r} of {key!r} is a number, not {value!r}")
    for what, codes in metrics.get("teacher_languages", {}).items():
        if not isinstance(codes, list) or not all(isinstance(code, str) for code in codes):
            raise UserError(f"'teacher_languages' of {what!r} is a list of strings, not {codes!r}")
    if not isinstance(metrics.get("label_names") or [], list):
        raise UserError(f"'label_names' is a list, not {metrics['label_names']!r}")


def is_number(value: Any) -> bool:
    """Whether it is an integer of 64 bits or a float, NaN and infinity included."""
    if isinstance(value, int) and not isinstance(value, bool):
        return -(1 << 63) <= value < 1 << 63
    return isinstance(value, float)


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"{path} is no file")
    if path.stat().st_size > _MOST:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes, more than a run writes")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error}") from error


def _parse(text: str, origin: str) -> Any:
    try:
        value = json.loads(text)
        # Half of a surrogate pair cannot be written to the page.
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise UserError(f"{origin} is not JSON: {error}") from error
    return value


def _log_entry(line: str, origin: str) -> dict[str, Any]:
    entry = _parse(line, origin)
    if not isinstance(entry, dict) or not is_number(entry.get("step")) or not math.isfinite(entry["step"]):
        raise UserError(f"{origin} has no number 'step': {line.strip()[:80]}")
    for name in ("teacher_weight", "teacher_margin", "teacher_importance"):
        table = entry.get(name, {})
        rows = table.values() if isinstance(table, dict) else [None]
        if not all(isinstance(row, dict) and all(map(is_number, row.values())) for row in rows):
            raise UserError(f"{origin}: {name} is not {{teacher: {{language: number}}}}: {table}")
    return entry


def _check_result(system: str, result: Any, languages: list[str]) -> None:
    if not isinstance(result, Mapping) or not isinstance(result.get("per_language"), Mapping):
        raise UserError(f"'test' of {system!r} needs 'per_language'")
    if not result["per_language"]:
        raise UserError(f"'test' of {system!r} has no language in 'per_language'")
    for code, cell in result["per_language"].items():
        if code not in languages:
            raise UserError(f"{system!r} was tested in {code!r}, which is not in {languages}")
        accuracy = cell.get("accuracy") if isinstance(cell, Mapping) else None
        if accuracy is None or not is_number(accuracy) or not 0 <= accuracy <= 1:
            raise UserError(f"accuracy of {system!r} in {code!r} is in [0, 1], not {accuracy!r}")
        if not is_number(cell.get("count", 0)) or cell.get("count", 0) < 0:
            raise UserError(f"count of {system!r} in {code!r} is a number of texts, not {cell['count']!r}")
