"""Teachers' logits, computed once and kept as memory-mapped Arrow shards that are found again by their content.

PATH/TEACHER/SPLIT-KEY/key.json            what the key is of: data, weights, precision, labels, languages, format
PATH/TEACHER/SPLIT-KEY/shard-00000.arrow   rows 0 to shard_rows - 1 of the split, a data set of its own
PATH/TEACHER/SPLIT-KEY/shard-00000.json    its SHA-256; a shard without one, or of another content, is never read
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, List, Value
from datasets.arrow_writer import ArrowWriter
from torch import Tensor
from tqdm.auto import tqdm

from amtss_fast._system.files import publish, write_atomically
from amtss_fast.loss.logits import QuantizedLogits, quantize_logits
from amtss_fast.teachers.teacher import TeacherPool

FORMATS = ("float32", "bfloat16", "codes")
ROW = "cache_row"
"""The column of encoded rows that says which cached row is theirs."""
_VERSION = 1


def default_format(classes: int) -> str:
    """Exact for few classes, 8-bit codes where float32 would fill disks."""
    return "float32" if classes <= 64 else "codes"


def files_digest(folder: str | Path) -> str:
    """SHA-256 of the weights, configuration and tokenizer that a folder or a Hub id holds."""
    if not Path(folder).is_dir():
        from huggingface_hub import snapshot_download

        folder = snapshot_download(str(folder), allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model"])
    digest = hashlib.sha256()
    files = sorted(p for p in Path(folder).iterdir() if p.suffix in (".safetensors", ".json", ".txt", ".model"))
    for file in files:
        digest.update(f"{file.name}\0{_sha256(file)}\0".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class CacheEntry:
    """One teacher's logits of one split.

    Args:
        root: where caches are kept.
        teacher: the teacher's name.
        split: the name of the split.
        key: what decides about the logits: any JSON. Another key is another entry.
        rows: rows of the split.
        classes: logits of each row.
        format: one of `FORMATS`.
        shard_rows: rows of a shard; what a kill loses at most.
    """

    root: Path
    teacher: str
    split: str
    key: Mapping[str, Any]
    rows: int
    classes: int
    format: str
    shard_rows: int

    @cached_property
    def _full_key(self) -> dict[str, Any]:
        shape = {"rows": self.rows, "classes": self.classes, "format": self.format, "shard_rows": self.shard_rows}
        key: dict[str, Any] = json.loads(json.dumps({"version": _VERSION, **shape, **self.key}))
        return key

    @cached_property
    def folder(self) -> Path:
        """Where its shards lie."""
        text = json.dumps(self._full_key, sort_keys=True)
        return self.root / self.teacher / f"{self.split}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    @property
    def shards(self) -> int:
        """How many shards there are, the last one perhaps shorter."""
        return -(-self.rows // self.shard_rows)

    def compute(self, logits: Callable[[Sequence[int]], Tensor], *, rank: int = 0, world_size: int = 1) -> int:
        """Computes the shards that are missing, cut off or altered; returns how many.

        Safe to kill at any moment and to start again: whole shards are kept. Processes may share the work
        (`rank` of `world_size`), on one machine or on several with a common file system.

        Args:
            logits: gives float32 logits [n, C] of n rows of the split.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        key = self.folder / "key.json"
        write_atomically(key, json.dumps(self._full_key, indent=1), _partial(key))
        for partial in self.folder.glob(f"*.{socket.gethostname()}-*.partial"):
            if not _alive(int(partial.name.split("-")[-1].split(".")[0])):
                partial.unlink(missing_ok=True)
        missing = [i for i in range(rank, self.shards, world_size) if self._problem(i) is not None]
        for index in tqdm(missing, desc=f"{self.teacher}, {self.split}", unit="shard", disable=rank > 0 or not missing):
            values = logits(range(*self._span(index)))
            self._write_shard(index, values.detach().float().cpu())
        return len(missing)

    def open(self) -> CachedLogits:
        """Its logits, memory-mapped, after all checksums have been verified.

        Raises:
            FileNotFoundError: nothing cached for this key; says what differs from what is there.
            ValueError: shards that are missing, cut off or altered; names them.
        """
        if not self.folder.is_dir():
            raise FileNotFoundError(
                f"no cached logits of teacher {self.teacher!r} for split {self.split!r} in "
                f"{self.root}{self._differences()}; `amtss-fast cache` computes them"
            )
        problems = [text for i in range(self.shards) if (text := self._problem(i)) is not None]
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise ValueError(
                f"cached logits in {self.folder}: {', '.join(problems[:3])}{more}; "
                "`amtss-fast cache` computes them again"
            )
        return CachedLogits([self._file(i) for i in range(self.shards)], self)

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
        if _sha256(file) != json.loads(sums.read_text())["sha256"]:
            return f"{file.name} was altered or cut off"
        return None

    @property
    def features(self) -> Features:
        """The columns of a shard. bfloat16 values are kept as their 16 bits, which Arrow has no type for."""
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
        if self.format == "codes":
            quantized = quantize_logits(values)
            columns = {"codes": quantized.codes, "row_max": quantized.row_max, "step": quantized.step}
        elif self.format == "bfloat16":
            columns = {"logits": values.bfloat16().view(torch.uint16)}
        else:
            columns = {"logits": values}
        schema = self.features.arrow_schema
        arrays = [
            pa.FixedSizeListArray.from_arrays(pa.array(c.flatten().numpy()), self.classes)
            if c.dim() == 2
            else pa.array(c.numpy())
            for c in columns.values()
        ]
        file = self._file(index)
        partial = _partial(file)
        # One record batch: one array to map.
        with ArrowWriter(features=self.features, path=str(partial), writer_batch_size=len(values)) as writer:
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema), len(values))
            writer.finalize()
        digest = _sha256(partial)
        # The old checksum goes first: at no moment does it stand beside another shard.
        file.with_suffix(".json").unlink(missing_ok=True)
        publish(partial, file)
        checksum = file.with_suffix(".json")
        write_atomically(checksum, json.dumps({"sha256": digest}), _partial(checksum))

    def _differences(self) -> str:
        others = sorted((self.root / self.teacher).glob(f"{self.split}-*/key.json"), key=os.path.getmtime)
        if not others:
            return ""
        other = json.loads(others[-1].read_text())
        names = sorted(name for name in {*other, *self._full_key} if other.get(name) != self._full_key.get(name))
        shown = ", ".join(f"{name} (cached: {other.get(name)!r}, now: {self._full_key.get(name)!r})" for name in names)
        return f": the latest, {others[-1].parent.name}, differs in {shown}"


class CachedLogits:
    """Memory-mapped logits of a split, row by row; made by :meth:`CacheEntry.open`."""

    def __init__(self, files: Sequence[Path], entry: CacheEntry) -> None:
        self._entry = entry
        self._columns: dict[str, list[np.ndarray]] = {name: [] for name in entry.features}
        # Kept, as the arrays are views of them.
        self._shards = [Dataset.from_file(str(file)) for file in files]
        for shard in self._shards:
            for name, arrays in self._columns.items():
                column = shard.data.column(name).combine_chunks()
                if isinstance(column, pa.ChunkedArray):
                    column = column.chunk(0)
                arrays.append(
                    column.flatten().to_numpy(zero_copy_only=True).reshape(-1, entry.classes)
                    if pa.types.is_fixed_size_list(column.type)
                    else column.to_numpy(zero_copy_only=True)
                )

    def __len__(self) -> int:
        return self._entry.rows

    def read(self, rows: Tensor) -> Tensor | QuantizedLogits:
        """Logits [n, C] of `rows` [n] as they are kept: float32, bfloat16, or 8-bit codes.

        Raises IndexError for a row that the split has not.
        """
        numbers = rows.cpu().numpy()
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(self):
            raise IndexError(f"cached rows are 0 to {len(self) - 1}, got {numbers.min()} to {numbers.max()}")
        places = [divmod(int(n), self._entry.shard_rows) for n in numbers]

        def column(name: str) -> Tensor:
            arrays = self._columns[name]
            shape = (len(places), *arrays[0].shape[1:])
            values = np.empty(shape, arrays[0].dtype)
            for i, (shard, row) in enumerate(places):
                values[i] = arrays[shard][row]
            return torch.from_numpy(values)

        if self._entry.format == "codes":
            return QuantizedLogits(column("codes"), column("row_max"), column("step"))
        logits = column("logits")
        return logits.view(torch.bfloat16) if self._entry.format == "bfloat16" else logits


class CachedTeachers:
    """Takes the place of a :class:`TeacherPool` in training; no teacher is loaded.

    Args:
        logits: for each of K teachers the parts of its cache: rows of the first part come first in `cache_row`.
        names, priors: of the teachers.
        teaches: [K, L] bool, teacher k teaches language l.
        label_names, languages: the student's, as for a pool.
    """

    needs_text = False

    def __init__(
        self,
        logits: Sequence[Sequence[CachedLogits]],
        *,
        names: Sequence[str],
        priors: Sequence[float],
        teaches: Tensor,
        label_names: Sequence[str],
        languages: Sequence[str],
    ) -> None:
        self._logits = logits
        self.names = list(names)
        self.prior = torch.tensor(priors, dtype=torch.float32)
        self.teaches = teaches
        self.label_names = list(label_names)
        self.languages = list(languages)

    def __len__(self) -> int:
        return len(self.names)

    def logits(self, batch: Mapping[str, Any]) -> tuple[list[Tensor | QuantizedLogits], Tensor]:
        """As :meth:`TeacherPool.logits`, of the rows `cache_row` [N]; K of [N, C] as they are kept.

        Raises ValueError for a batch without `cache_row`.
        """
        rows, language_ids = batch.get(ROW), batch["language_ids"]
        if rows is None:
            raise ValueError(f"the batch has no {ROW!r}: training from cached logits needs rows made for it")
        device = language_ids.device
        mask = self.teaches.to(device)[:, language_ids]
        return [self._read(parts, rows).to(device) for parts in self._logits], mask

    def ask(self, batch: Mapping[str, Any]) -> Callable[[], tuple[list[Tensor | QuantizedLogits], Tensor]]:
        """As :meth:`TeacherPool.ask`: they are read when the function is called."""
        return lambda: self.logits(batch)

    @staticmethod
    def _read(parts: Sequence[CachedLogits], rows: Tensor) -> Tensor | QuantizedLogits:
        # The rows of a batch are all of one split.
        start = 0
        for part in parts:
            if len(rows) == 0 or int(rows[0]) < start + len(part):
                return part.read(rows - start)
            start += len(part)
        raise IndexError(f"cached rows are 0 to {start - 1}, got {int(rows[0])}")


def pool_logits(
    pool: TeacherPool, encoded: Dataset, collate: Any, batch_size: int
) -> Callable[[Sequence[int]], Tensor]:
    """What `CacheEntry.compute` asks: logits of a pool of one teacher, in batches of rows of like length."""

    def logits(rows: Sequence[int]) -> Tensor:
        part = encoded.select(rows)
        order = np.argsort([len(ids) for ids in part["input_ids"]], kind="stable")
        result = torch.zeros(len(part), len(pool.label_names))
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            values, _ = pool.logits(collate([part[int(i)] for i in places]))
            result[torch.from_numpy(places)] = values[0].cpu()
        return result

    return logits


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
    # Two machines may write the same shard; each has a name of its own until it is whole.
    return file.with_name(f"{file.name}.{socket.gethostname()}-{os.getpid()}.partial")
