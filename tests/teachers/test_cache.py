"""Cached logits: what comes back, kills, altered bytes, other content."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from tiny import tiny_teacher
from torch import Tensor

from amtss_fast.loss.logits import QuantizedLogits, quantize_logits
from amtss_fast.teachers import ROW, CachedTeachers, CacheEntry, cache

VALUES = torch.randn(37, 5, generator=torch.Generator().manual_seed(0)) * 5


def make_entry(root: Path, **options: Any) -> CacheEntry:
    values = {"teacher": "a", "split": "train", "key": {"weights": "1"}, "rows": 37, "classes": 5, "shard_rows": 10}
    return CacheEntry(root=root, **{**values, "format": "float32", **options})


def logits(rows: Sequence[int]) -> Tensor:
    return VALUES[list(rows)]


@pytest.mark.parametrize("format", cache.FORMATS)
def test_what_comes_back(tmp_path: Path, format: str) -> None:
    entry = make_entry(tmp_path, format=format)
    assert entry.compute(logits) == 4
    assert entry.compute(logits) == 0
    rows = torch.tensor([36, 0, 9, 10, 10, 25])
    read = make_entry(tmp_path, format=format).open().read(rows)
    if format == "codes":
        assert isinstance(read, QuantizedLogits)
        for part, expected in zip(read, quantize_logits(VALUES[rows]), strict=True):
            assert torch.equal(part, expected)
    else:
        assert torch.equal(read, VALUES[rows].to(getattr(torch, format)))
    with pytest.raises(IndexError, match="cached rows are 0 to 36, got 5 to 37"):
        entry.open().read(torch.tensor([5, 37]))


def test_the_shards_are_mapped_not_read(tmp_path: Path) -> None:
    entry = make_entry(tmp_path)
    entry.compute(logits)
    entry.open()
    opened = entry.open()
    maps = Path("/proc/self/maps").read_text()
    assert all(str(file) in maps for file in entry.folder.glob("*.arrow"))
    assert not opened._columns["logits"][0].flags.owndata


@pytest.mark.parametrize("moment", ["in the data", "before the name", "before the checksum", "in the checksum"])
def test_a_kill_at_any_moment(tmp_path: Path, moment: str) -> None:
    entry = make_entry(tmp_path)
    child = os.fork()
    if child == 0:
        try:
            die_in_the_second_shard(entry, moment)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    left = [file.name for file in entry.folder.iterdir()]
    assert any(name.endswith(".partial") for name in left) or moment == "before the checksum"
    with pytest.raises(
        ValueError, match=r": shard-00001.arrow is missing, shard-00002.arrow is missing, .*`amtss-fast"
    ):
        entry.open()
    # The first shard was whole.
    assert entry.compute(logits) == 3
    assert torch.equal(entry.open().read(torch.arange(37)), VALUES)
    assert not list(entry.folder.glob("*.partial"))


def die_in_the_second_shard(entry: CacheEntry, moment: str) -> None:
    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    publish, write = cache.publish, cache.write_atomically

    def dying_publish(partial: Path, file: Path) -> None:
        if file.name == "shard-00001.arrow":
            if moment == "in the data":
                os.truncate(partial, 100)
                kill()
            if moment == "before the name":
                kill()
        publish(partial, file)

    def dying_write(file: Path, data: str, partial: Path) -> None:
        if file.name == "shard-00001.json":
            if moment == "in the checksum":
                partial.write_text(data[:5])
            kill()
        write(file, data, partial)

    cache.publish, cache.write_atomically = dying_publish, dying_write
    entry.compute(logits)


@pytest.mark.parametrize("damage", ["altered", "cut off", "no checksum", "gone"])
def test_a_damaged_shard_is_never_read_and_computed_again(tmp_path: Path, damage: str) -> None:
    entry = make_entry(tmp_path)
    entry.compute(logits)
    file = entry.folder / "shard-00002.arrow"
    data = bytearray(file.read_bytes())
    if damage == "altered":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "cut off":
        file.write_bytes(data[:-8])
    elif damage == "no checksum":
        file.with_suffix(".json").unlink()
    else:
        file.unlink()
    with pytest.raises(ValueError, match=r"shard-00002.arrow (was altered or cut off|is missing); `amtss-fast cache`"):
        entry.open()
    asked: list[int] = []
    assert entry.compute(lambda rows: asked.extend(rows) or logits(rows)) == 1
    assert asked == list(range(20, 30))
    assert torch.equal(entry.open().read(torch.arange(37)), VALUES)


def test_processes_share_the_shards(tmp_path: Path) -> None:
    entry = make_entry(tmp_path)
    assert [entry.compute(logits, rank=rank, world_size=3) for rank in range(3)] == [2, 1, 1]
    assert torch.equal(entry.open().read(torch.arange(37)), VALUES)


def test_other_content_is_another_entry(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no cached logits of teacher 'a' for split 'train' in .*`amtss-fast ca"
    ):
        make_entry(tmp_path).open()
    make_entry(tmp_path).compute(logits)
    other = make_entry(tmp_path, key={"weights": "2", "labels": ["x"]}, format="codes")
    message = (
        r"differs in format \(cached: 'float32', now: 'codes'\), labels \(cached: None, now: \['x'\]\), "
        r"weights \(cached: '1', now: '2'\); `amtss-fast cache`"
    )
    with pytest.raises(FileNotFoundError, match=message):
        other.open()
    with pytest.raises(ValueError, match=r"logits of rows 0 to 9 must be \[10, 5\], got \[10, 3\]"):
        other.compute(lambda rows: torch.zeros(len(rows), 3))


def test_files_digest_is_of_the_content(tmp_path: Path) -> None:
    first, second = tiny_teacher(tmp_path / "a"), tiny_teacher(tmp_path / "b")
    digest = cache.files_digest(first)
    assert digest == cache.files_digest(second)
    (second / "notes.md").write_text("not part of the teacher")
    assert digest == cache.files_digest(second)
    weights = bytearray((second / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (second / "model.safetensors").write_bytes(weights)
    assert digest != cache.files_digest(second)


def test_rows_are_numbered_through_the_cached_splits(tmp_path: Path) -> None:
    entries = [make_entry(tmp_path), make_entry(tmp_path, split="validation", rows=7)]
    for entry in entries:
        entry.compute(logits)
    teachers = CachedTeachers(
        [[entry.open() for entry in entries]],
        names=["a"],
        priors=[1.0],
        teaches=torch.tensor([[True, False]]),
        label_names=list("vwxyz"),
        languages=["en", "sw"],
    )
    sizes = {"train": 37, "validation": 7, "test": 3}
    splits = DatasetDict({name: Dataset.from_dict({"n": list(range(size))}) for name, size in sizes.items()})
    numbered = teachers.number_rows(splits)
    assert numbered["train"][ROW][:] == list(range(37))
    assert numbered["validation"][ROW][:] == list(range(37, 44))
    assert numbered["test"].column_names == splits["train"].column_names == ["n"]
    answers = teachers.ask({ROW: torch.tensor([39, 37]), "language_ids": torch.tensor([1, 0])})()
    assert torch.equal(answers.outputs[0], VALUES[[2, 0]])
    assert answers.mask.tolist() == [[False, True]]
    with pytest.raises(IndexError, match="cached rows are 0 to 43, got 44"):
        teachers.logits({ROW: torch.tensor([44]), "language_ids": torch.tensor([0])})
