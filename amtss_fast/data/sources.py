"""Where data comes from: embedded files, the Hub, local files, as Arrow tables by split.

`amtss_fast.data.load` gives them their standard shape.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from amtss_fast.data.arrow import blank_to_null, is_text, plain_table
from amtss_fast.data.file_names import FileName, one_spelling
from amtss_fast.data.files import FORMATS, SAVED, SAVED_SPLITS, file_format, read_file
from amtss_fast.errors import UserError

PathLike: TypeAlias = str | Path
Source: TypeAlias = PathLike | Sequence[PathLike] | Mapping[str, PathLike | Sequence[PathLike]]

# name -> (text column, text_pair column)
EMBEDDED: dict[str, tuple[str, str | None]] = {
    "cldr_topic": ("text", None),
    "cldr_pairs": ("premise", "hypothesis"),
}
XNLI_LANGUAGES = ("ar", "bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh")

_EMBEDDED_FOLDER = Path(__file__).parent / "embedded"
_XNLI = ("xnli", "facebook/xnli")


@dataclass(frozen=True)
class Part:
    """One table as it was read."""

    table: pa.Table
    origin: str
    """Where it came from, for messages."""
    language: str | None = None
    """The language of all its rows, if the name of the file, folder or configuration gives it."""


def read_parts(
    source: Source,
    *,
    split_column: str | None,
    languages: Sequence[str] | None,
    config: str | None,
    hub: Mapping[str, Any],
) -> dict[str, list[Part]]:
    """The tables of each split, with the columns of the source; arguments as in `amtss_fast.data.load_data`."""
    if is_embedded(source) or not is_hub_id(source):
        if config is not None or hub:
            given = {**({} if config is None else {"config": config}), **hub}
            raise TypeError(f"{source!r} is not on the Hub and takes no Hub arguments: {given}")
        if is_embedded(source):
            table = pa.parquet.read_table(_EMBEDDED_FOLDER / f"{source}.parquet")
            return _split_rows(Part(table, str(source)), "split")
        return _read_local(source, split_column, languages)
    return _read_hub(str(source), config, languages, hub)


def is_embedded(source: Source) -> bool:
    """Whether the source is the name of an embedded set."""
    return isinstance(source, str) and source in EMBEDDED


def is_hub_id(source: Source) -> bool:
    """A Hub id: `name` or `owner/name` that is no local path and does not look like one."""
    if not isinstance(source, str):
        return False
    if source in _XNLI:
        return True
    plain = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source) is not None
    return plain and not Path(source).exists() and Path(source).suffix not in FORMATS


def _read_hub(
    name: str, config: str | None, languages: Sequence[str] | None, hub: Mapping[str, Any]
) -> dict[str, list[Part]]:
    for argument, instead in (("split", "splits="), ("name", "config="), ("streaming", "nothing")):
        if argument in hub:
            raise TypeError(f"load_data takes no {argument}=; use {instead} instead")
    configs: list[str | None] = [config]
    if name in _XNLI:
        name = "facebook/xnli"
        configs = _xnli_configs(config, languages)
    parts: dict[str, list[Part]] = {}
    for chosen in configs:
        try:
            loaded = datasets.load_dataset(name, chosen, **hub)
        except (FileNotFoundError, ConnectionError) as error:
            raise FileNotFoundError(
                f"no data set {name!r}: it is not one of the embedded sets {sorted(EMBEDDED)}, no "
                f"local path, and the Hub did not give it ({type(error).__name__}: {error})"
            ) from error
        own_language = chosen if name == "facebook/xnli" and chosen != "all_languages" else None
        origin = name if chosen is None else f"{name} ({chosen})"
        for split, dataset in loaded.items():
            part = Part(plain_table(dataset.with_format("arrow")[:]), f"{origin}, split {split}", own_language)
            parts.setdefault(str(split), []).append(part)
    return parts


def _xnli_configs(config: str | None, languages: Sequence[str] | None) -> list[str | None]:
    configs: list[str | None] = [config]
    if config is None:
        configs = ["all_languages"] if languages is None else list(languages)
    allowed = ("all_languages", *XNLI_LANGUAGES)
    unknown = [code for code in configs if code not in allowed]
    if unknown:
        raise UserError(f"XNLI has no {unknown}; it has {list(allowed)}")
    return configs


def _read_local(source: Source, split_column: str | None, languages: Sequence[str] | None) -> dict[str, list[Part]]:
    found = _local_files(source)
    parts: dict[str, list[Part]] = {}
    unnamed: list[tuple[File, Part]] = []
    for file in found:
        name = FileName(file.path, file.root)
        split = file.split or name.split(languages)
        part = Part(read_file(file.path), str(file.path), name.language(languages))
        if split is not None:
            parts.setdefault(split, []).append(part)
        elif split_column is not None and split_column in part.table.column_names:
            for split, rows in _split_rows(part, split_column).items():
                parts.setdefault(split, []).extend(rows)
        else:
            unnamed.append((file, part))
    _check_unnamed(unnamed, parts, len(found))
    if unnamed:
        parts["train"] = [part for _, part in unnamed]
    one_spelling(
        [part.language for listed in parts.values() for part in listed if part.language], "the names of the files"
    )
    return parts


def _check_unnamed(unnamed: Sequence[tuple[File, Part]], parts: Mapping[str, Sequence[Part]], count: int) -> None:
    """Files that name no split are all to train on, but only if it is clear that they are."""
    if unnamed and parts:
        raise UserError(
            f"{unnamed[0][1].origin} names no split, but the files beside it do: "
            f"{[part.origin for listed in parts.values() for part in listed][:10]}; "
            "give a mapping {split: files}"
        )
    for file, _ in unnamed if count > 1 else []:
        word = FileName(file.path, file.root).split_word()
        if word is not None:
            raise UserError(
                f"{file.path}: {word!r} in the name may be a split or a part of a title; "
                f"call the file {word}{file.path.suffix} or the like, or give a mapping {{split: files}}"
            )


@dataclass(frozen=True)
class File:
    """A data file, or a folder that `Dataset.save_to_disk` wrote."""

    path: Path
    root: Path
    """The folder from which its name counts."""
    split: str | None = None
    """Its split, where a mapping or a saved `DatasetDict` says it."""


def _local_files(source: Source) -> list[File]:
    given: list[tuple[str | None, Any]] = [*source.items()] if isinstance(source, Mapping) else [(None, source)]
    files: list[File] = []
    for split, paths in given:
        for path in [paths] if isinstance(paths, (str, Path)) else paths:
            for file in _find_files(Path(path).expanduser()):
                if split is not None and file.split is not None:
                    raise UserError(f"{path} has splits of its own, and cannot be {split!r}; give one of its folders")
                files.append(File(file.path, file.root, split or file.split))
    formats = sorted({file_format(file.path) for file in files})
    if len(formats) > 1:
        raise UserError(f"{source!r} mixes the formats {formats}; give one of them, for example 'folder/*{formats[0]}'")
    return files


def _find_files(path: Path) -> list[File]:
    """The data files under a file, folder or glob pattern."""
    if path.is_file():
        if file_format(path) not in FORMATS:
            hint = "; give the folder that save_to_disk wrote" if path.suffix == ".arrow" else ""
            raise UserError(f"{path}: unknown format {path.suffix!r}; known are {list(FORMATS)}{hint}")
        return [File(path, path.parent)]
    if path.is_dir():
        saved = _saved_files(path)
        inside = {file.path for file in saved} | {file.path.parent for file in saved if file.split is not None}
        files = [
            *saved,
            *(
                File(file, path)
                for file in sorted(path.rglob("*"))
                if file.is_file() and file_format(file) in FORMATS and file.parent not in inside and _shows(file, path)
            ),
        ]
        if not files:
            found = sorted(file.name for file in path.iterdir())[:10]
            raise FileNotFoundError(f"{path} holds no file in a known format {list(FORMATS)}; it holds {found}")
        return files
    matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    if not matches:
        raise FileNotFoundError(f"no file or folder {str(path)!r}; embedded sets: {sorted(EMBEDDED)}")
    return [found for match in matches for found in _find_files(match)]


def _shows(file: Path, folder: Path) -> bool:
    """Whether neither the file nor a folder on the way to it is hidden: those hold copies that editors keep."""
    return not any(part.startswith(".") for part in file.relative_to(folder).parts)


def _saved_files(folder: Path) -> list[File]:
    """What `save_to_disk` wrote into a folder, or into folders below it."""
    files = [File(state.parent, folder) for state in sorted(folder.rglob(SAVED)) if _shows(state, folder)]
    files = [File(file.path, folder.parent) if file.path == folder else file for file in files]
    for index in sorted(folder.rglob(SAVED_SPLITS)):
        # Each split has a folder, which is called as the split whatever that is.
        try:
            names = list(json.loads(index.read_text("utf-8"))["splits"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{index} cannot be read as the index of a saved data set: {error}") from error
        missing = [name for name in names if not (index.parent / name / SAVED).is_file()]
        if missing:
            raise UserError(f"{index.parent} is incomplete: its splits {missing} are not there")
        splits = {index.parent / name: name for name in names}
        files = [File(file.path, file.root, splits.get(file.path, file.split)) for file in files]
    return files


def _split_rows(part: Part, column: str) -> dict[str, list[Part]]:
    """The rows of a table by the split that a column names."""
    values = part.table[column]
    if is_text(values.type):
        values = blank_to_null(values)
    if values.null_count:
        raise UserError(f"{part.origin}: column {column!r} has {values.null_count} empty values")
    return {
        str(split): [Part(part.table.filter(pc.equal(values, split)), part.origin, part.language)]
        for split in values.unique().to_pylist()
    }
