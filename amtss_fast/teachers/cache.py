"""Files of teachers' logits: computed once, stored as Arrow shards, read through memory maps.

PATH/TEACHER/SPLIT-KEY/key.json            everything that decides about the logits; KEY is its hash
PATH/TEACHER/SPLIT-KEY/shard-00000.arrow   rows 0 to shard_rows - 1 of the split, a data set of its own
PATH/TEACHER/SPLIT-KEY/shard-00000.json    its SHA-256; a shard without one, or with another content, is never read
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Features, List, Value
from torch import Tensor
from tqdm.auto import tqdm

from amtss_fast._system.files import names_file, publish, write_atomically
from amtss_fast.errors import UserError
from amtss_fast.loss.logits import QuantizedLogits, quantize_logits
from amtss_fast.models.places import loading
from amtss_fast.teachers.shards import column_array, map_shard

FORMATS = ("float32", "bfloat16", "codes")
"""How logits are stored; `codes` are those of :class:`amtss_fast.QuantizedLogits`."""
_VERSION = 1
# Bytes of the JSON files, which are read whole: a checksum, and a key with its names of labels.
_MOST_OF_SUMS, _MOST_OF_KEY = 1 << 12, 1 << 26


def default_format(classes: int) -> str:
    """`float32`, which is exact, up to 64 classes; `codes` for more, where float32 would take too much disk space."""
    return "float32" if classes <= 64 else "codes"


def files_digest(folder: str | Path) -> str:
    """SHA-256 of the weights, configuration and tokenizer in a folder, or under a Hub id, which is then downloaded."""
    with loading("teacher", folder) as place:
        folder = place
        if not Path(place).is_dir():
            from huggingface_hub import snapshot_download

            folder = snapshot_download(place, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model"])
    digest = hashlib.sha256()
    suffixes = (".safetensors", ".json", ".txt", ".model")
    files = sorted(p for p in Path(folder).iterdir() if p.suffix in suffixes and p.is_file())
    for file in files:
        digest.update(f"{file.name}\0{_sha256(file)}\0".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class CacheEntry:
    """The stored logits of one teacher for one split.

    Args:
        root: the folder of all caches.
        teacher: the teacher's name.
        split: the name of the split.
        key: everything that decides about the logits (data, weights, precision, labels, ...), as JSON values. Another
            key is another entry.
        rows: rows of the split.
        classes: logits of each row.
        format: one of `FORMATS`.
        shard_rows: rows of a shard. A killed process loses at most one shard.

    Raises:
        UserError: names that are no names of folders, sizes below 1, an unknown format.
    """

    root: Path
    teacher: str
    split: str
    key: Mapping[str, Any]
    rows: int
    classes: int
    format: str
    shard_rows: int

    def __post_init__(self) -> None:
        for what, name in (("teacher", self.teacher), ("split", self.split)):
            if not re.fullmatch(r"[\w.-]+", name) or not name.strip("."):
                raise UserError(f"{what} {name!r} cannot be the name of a folder of cached logits")
        for what, size in (("rows", self.rows), ("classes", self.classes), ("shard_rows", self.shard_rows)):
            if size < 1:
                raise UserError(f"{what} of cached logits must be at least 1, got {size}")
        if self.format not in FORMATS:
            raise UserError(f"the format of cached logits is one of {list(FORMATS)}, not {self.format!r}")

    @cached_property
    def _full_key(self) -> dict[str, Any]:
        shape = {"rows": self.rows, "classes": self.classes, "format": self.format, "shard_rows": self.shard_rows}
        key: dict[str, Any] = json.loads(json.dumps({"version": _VERSION, **shape, **self.key}))
        return key

    @cached_property
    def folder(self) -> Path:
        """The folder of its shards."""
        text = json.dumps(self._full_key, sort_keys=True)
        return self.root / self.teacher / f"{self.split}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    @property
    def shards(self) -> int:
        """The number of shards; the last one may be shorter."""
        return -(-self.rows // self.shard_rows)

    def compute(self, logits: Callable[[Sequence[int]], Tensor], *, rank: int = 0, world_size: int = 1) -> int:
        """Computes the shards that are missing, cut off or altered; returns how many.

        It may be killed at any moment and started again: whole shards are kept. Processes may share the work
        (`rank` of `world_size`), on one machine or on several with a common file system.

        Args:
            logits: gives float32 logits [n, C] of n rows of the split.

        Raises:
            ValueError: logits of another shape.
            UserError: the folder is a link to a place outside of the cache.
        """
        self._check_place()
        self.folder.mkdir(parents=True, exist_ok=True)
        key = self.folder / "key.json"
        write_atomically(key, json.dumps(self._full_key, indent=1), _partial(key))
        self._remove_partials()
        missing = [i for i in range(rank, self.shards, world_size) if self._problem(i) is not None]
        for index in tqdm(missing, desc=f"{self.teacher}, {self.split}", unit="shard", disable=rank > 0 or not missing):
            values = logits(range(*self._span(index)))
            self._write_shard(index, values.detach().float().cpu())
        return len(missing)

    def open(self) -> CachedLogits:
        """Verifies all checksums and returns the memory-mapped logits.

        Raises:
            FileNotFoundError: nothing cached for this key; the message says how the latest entry differs.
            UserError: shards that are missing, cut off, altered or not of this entry; the message names them.
        """
        self._check_place()
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"no cached logits of teacher {self.teacher!r} for split {self.split!r} in "
                f"{self.root}{self._differences()}; `amtss-fast cache` computes them"
            )
        problems = [text for i in range(self.shards) if (text := self._problem(i)) is not None]
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise UserError(
                f"cached logits in {self.folder}: {', '.join(problems[:3])}{more}; "
                "`amtss-fast cache` computes them again"
            )
        return CachedLogits([self._file(i) for i in range(self.shards)], self)

    def _check_place(self) -> None:
        """Raises UserError if links lead out of the cache: what is written there would overwrite other files."""
        if not self.folder.resolve().is_relative_to(self.root.resolve()):
            raise UserError(
                f"cached logits in {self.folder}: it is a link to {self.folder.resolve()}, not in {self.root}"
            )

    def _remove_partials(self) -> None:
        """Removes what processes of this machine have left that are no more."""
        for partial in self.folder.glob(f"*.{glob.escape(socket.gethostname())}-*.partial"):
            process = re.search(r"-(\d{1,9})\.partial$", partial.name)
            if process is not None and not _alive(int(process[1])):
                partial.unlink(missing_ok=True)

    def _file(self, index: int) -> Path:
        return self.folder / f"shard-{index:05}.arrow"

    def _span(self, index: int) -> tuple[int, int]:
        return index * self.shard_rows, min((index + 1) * self.shard_rows, self.rows)

    def _problem(self, index: int) -> str | None:
        """Why a shard must not be read; None if it is whole."""
        file = self._file(index)
        sums = file.with_suffix(".json")
        if not file.is_file() or not sums.is_file():
            return f"{file.name} is missing"
        said = _read_json(sums, _MOST_OF_SUMS)
        if said is None:
            return f"{sums.name} is no checksum"
        if _sha256(file) != said.get("sha256"):
            return f"{file.name} was altered or cut off"
        return None

    @property
    def features(self) -> Features:
        """The columns of a shard. bfloat16 values are stored as 16-bit integers, because Arrow has no such type."""
        if self.format == "codes":
            codes = List(Value("uint8"), length=self.classes)
            return Features({"codes": codes, "row_max": Value("float32"), "step": Value("float32")})
        kind = "float32" if self.format == "float32" else "uint16"
        return Features({"logits": List(Value(kind), length=self.classes)})

    def _write_shard(self, index: int, values: Tensor) -> None:
        start, end = self._span(index)
        if values.shape != (end - start, self.classes):
            raise ValueError(
                f"logits of rows {start} to {end - 1} must be [{end - start}, {self.classes}], got {list(values.shape)}"
            )
        file = self._file(index)
        checksum, partial = file.with_suffix(".json"), _partial(file)
        # One record batch: one array to map.
        table = self._table(values)
        # It may be a link.
        partial.unlink(missing_ok=True)
        try:
            with names_file(file), pa.ipc.new_stream(str(partial), table.schema) as writer:
                writer.write_table(table)
            digest = _sha256(partial)
            # The old checksum is removed first, so that it never lies beside another shard.
            checksum.unlink(missing_ok=True)
            publish(partial, file)
        finally:
            partial.unlink(missing_ok=True)
        write_atomically(checksum, json.dumps({"sha256": digest}), _partial(checksum))

    def _table(self, values: Tensor) -> pa.Table:
        """float32 logits [n, C] as the columns of `features`."""
        columns: tuple[Tensor, ...]
        if self.format == "codes":
            columns = quantize_logits(values)
        elif self.format == "bfloat16":
            columns = (values.bfloat16().view(torch.uint16),)
        else:
            columns = (values,)
        arrays = [
            pa.FixedSizeListArray.from_arrays(pa.array(column.flatten().numpy()), self.classes)
            if column.dim() == 2
            else pa.array(column.numpy())
            for column in columns
        ]
        return pa.Table.from_arrays(arrays, schema=self.features.arrow_schema)

    def _differences(self) -> str:
        others = sorted((self.root / self.teacher).glob(f"{self.split}-*/key.json"), key=os.path.getmtime)
        if not others:
            return ""
        other, mine = _read_json(others[-1], _MOST_OF_KEY), self._full_key
        if other is None:
            return f": {others[-1]} is no key"
        names = sorted(name for name in {*other, *mine} if other.get(name) != mine.get(name))
        shown = ", ".join(
            f"{name if name.isprintable() and len(name) < 100 else _short(name)} "
            f"(cached: {_short(other.get(name))}, now: {_short(mine.get(name))})"
            for name in names
        )
        return f": the latest, {others[-1].parent.name}, differs in {shown}"


class CachedLogits:
    """Memory-mapped logits of a split, read row by row; made by :meth:`CacheEntry.open`."""

    def __init__(self, files: Sequence[Path], entry: CacheEntry) -> None:
        self._entry = entry
        # Kept, because the arrays are views of them.
        self._shards = [map_shard(file, entry.features.arrow_schema) for file in files]
        for index, (file, shard) in enumerate(zip(files, self._shards, strict=True)):
            rows = min(entry.shard_rows, entry.rows - index * entry.shard_rows)
            if len(shard) != rows:
                raise UserError(f"{file} has {len(shard)} rows, this part of the split has {rows}")
        self._columns = {
            name: [column_array(shard.column(name), entry.classes) for shard in self._shards] for name in entry.features
        }

    def __len__(self) -> int:
        return self._entry.rows

    @property
    def split(self) -> str:
        """The name of the split."""
        return self._entry.split

    def read(self, rows: Tensor) -> Tensor | QuantizedLogits:
        """Logits [n, C] of `rows` [n], as they are stored: float32, bfloat16, or 8-bit codes.

        Raises:
            IndexError: a row that the split does not have.
        """
        numbers = rows.cpu().numpy()
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(self):
            raise IndexError(f"cached rows are 0 to {len(self) - 1}, got {numbers.min()} to {numbers.max()}")
        places = [divmod(int(number), self._entry.shard_rows) for number in numbers]
        if self._entry.format == "codes":
            return QuantizedLogits(*(self._read(name, places) for name in ("codes", "row_max", "step")))
        logits = self._read("logits", places)
        return logits.view(torch.bfloat16) if self._entry.format == "bfloat16" else logits

    def _read(self, column: str, places: Sequence[tuple[int, int]]) -> Tensor:
        """Values of a column at (shard, row)."""
        arrays = self._columns[column]
        values = np.empty((len(places), *arrays[0].shape[1:]), arrays[0].dtype)
        for i, (shard, row) in enumerate(places):
            values[i] = arrays[shard][row]
        return torch.from_numpy(values)


def _read_json(file: Path, most: int) -> dict[str, Any] | None:
    """The object in a JSON file of at most so many bytes; None for anything else."""
    with file.open("rb") as stream:
        text = stream.read(most + 1)
    try:
        value = json.loads(text) if len(text) <= most else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _partial(file: Path) -> Path:
    # Two machines may write the same shard; until it is whole, each uses a name of its own.
    return file.with_name(f"{file.name}.{socket.gethostname()}-{os.getpid()}.partial")
