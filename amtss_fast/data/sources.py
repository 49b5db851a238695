"""Where data comes from: embedded files, the Hub, local files, as Arrow tables by split.

`amtss_fast.data.load` gives them their standard shape.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from amtss_fast.data.files import FORMATS, file_format, read_file
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
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
_LANGUAGE_CODE = re.compile(r"[a-z]{2}([-_][A-Za-z]{2,4})?")


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
    if is_embedded(source) or not _is_hub_id(source):
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


def _is_hub_id(source: Source) -> bool:
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
            part = Part(dataset.with_format("arrow")[:], f"{origin}, split {split}", own_language)
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
    named: list[tuple[str | None, Part]] = []
    for split, file, root in _local_files(source):
        words = [_words(piece) for piece in (*file.relative_to(root).parts[:-1], file.stem)]
        split = split or _split_of(words, file)
        part = Part(read_file(file), str(file), _language_of(file, root, words, languages))
        named.append((split, part))

    parts: dict[str, list[Part]] = {}
    for split, part in named:
        if split is not None:
            pieces = {split: [part]}
        elif split_column is not None and split_column in part.table.column_names:
            pieces = _split_rows(part, split_column)
        elif all(other is None for other, _ in named):
            pieces = {"train": [part]}
        else:
            raise UserError(
                f"{part.origin} names no split, but the files beside it do: "
                f"{[other.origin for found, other in named if found is not None]}; "
                "give a mapping {split: files}"
            )
        for name, found in pieces.items():
            parts.setdefault(name, []).extend(found)
    return parts


def _local_files(source: Source) -> list[tuple[str | None, Path, Path]]:
    """Each file with the split that a mapping gives it, and the folder from which its name counts."""
    given: list[tuple[str | None, Any]] = [*source.items()] if isinstance(source, Mapping) else [(None, source)]
    files: list[tuple[str | None, Path, Path]] = []
    for split, paths in given:
        for path in [paths] if isinstance(paths, (str, Path)) else paths:
            files += [(split, file, root) for file, root in _find_files(Path(path).expanduser())]
    formats = sorted({file_format(file) for _, file, _ in files})
    if len(formats) > 1:
        raise UserError(f"{source!r} mixes the formats {formats}; give one of them, for example 'folder/*{formats[0]}'")
    return files


def _find_files(path: Path) -> list[tuple[Path, Path]]:
    """The data files under a file, folder or glob pattern, each with the folder from which its name counts."""
    if path.is_file():
        if file_format(path) not in FORMATS:
            raise UserError(f"{path}: unknown format {path.suffix!r}; known are {list(FORMATS)}")
        return [(path, path.parent)]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file_format(file) in FORMATS)
        if not files:
            found = sorted(file.name for file in path.iterdir())[:10]
            raise FileNotFoundError(f"{path} holds no file in a known format {list(FORMATS)}; it holds {found}")
        return [(file, path) for file in files]
    matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    if not matches:
        raise FileNotFoundError(f"no file or folder {str(path)!r}; embedded sets: {sorted(EMBEDDED)}")
    return [found for match in matches for found in _find_files(match)]


def _words(piece: str) -> list[str]:
    return [word for word in re.split(r"[^A-Za-z0-9]+", piece) if word]


def _split_of(words: Sequence[Sequence[str]], file: Path) -> str | None:
    """The split that the file's name gives, or else the nearest folder's."""
    for piece in reversed(words):
        found = {_SPLIT_WORDS[word.lower()] for word in piece if word.lower() in _SPLIT_WORDS}
        if len(found) > 1:
            raise UserError(f"{file} names several splits: {sorted(found)}")
        if found:
            return found.pop()
    return None


def _language_of(file: Path, root: Path, words: Sequence[Sequence[str]], languages: Sequence[str] | None) -> str | None:
    """The language in a file's name (`train.pt-BR.csv`, `en_train.csv`) or a folder's (`en/`)."""
    pieces = list(file.relative_to(root).parts[:-1])
    # The stem without the split and the numbers of shards.
    rest = [word for word in words[-1] if word.lower() not in _SPLIT_WORDS and word != "of"]
    stem = "-".join(word for word in rest if not word.isdigit())
    for piece in (stem, *reversed(pieces)):
        if languages is not None and piece in languages:
            return piece
        if _LANGUAGE_CODE.fullmatch(piece):
            return piece
    return None


def _split_rows(part: Part, column: str) -> dict[str, list[Part]]:
    """The rows of a table by the split that a column names."""
    values = part.table[column]
    if values.null_count:
        raise UserError(f"{part.origin}: column {column!r} has {values.null_count} empty values")
    return {
        str(split): [Part(part.table.filter(pc.equal(values, split)), part.origin, part.language)]
        for split in values.unique().to_pylist()
    }
