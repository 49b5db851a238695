"""Crafted caches: what is written stays in the folder, what is read is checked, and nothing expands."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
from datasets import Features, List, Value
from test_cache import VALUES, logits, make_entry

from amtss_fast.errors import UserError
from amtss_fast.teachers import CacheEntry
from amtss_fast.teachers.cache import files_digest


@pytest.fixture
def entry(tmp_path: Path) -> CacheEntry:
    entry = make_entry(tmp_path / "cache")
    entry.compute(logits)
    return entry


def sign(file: Path) -> None:
    """Gives a file a right checksum, as whoever crafts a cache can."""
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    file.with_suffix(".json").write_text(json.dumps({"sha256": digest}))


def write(file: Path, table: pa.Table, compression: str | None = None, batch_rows: int | None = None) -> None:
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(str(file), table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=batch_rows)
    sign(file)


def rows(values: np.ndarray) -> pa.Table:
    array = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    return pa.table({"logits": array})


@pytest.mark.parametrize(
    "options",
    [
        {"teacher": "../x"},
        {"teacher": "/tmp/x"},
        {"teacher": ".."},
        {"teacher": ""},
        {"teacher": "a\0"},
        {"teacher": "a\\b"},
        {"split": "../train"},
        {"split": "a/b"},
        {"split": "*"},
        {"rows": 0},
        {"classes": -1},
        {"shard_rows": 0},
        {"format": "pickle"},
    ],
    ids=str,
)
def test_an_entry_stays_in_its_folder(tmp_path: Path, options: dict[str, object]) -> None:
    (value,) = options.values()
    with pytest.raises(UserError, match="cached logits") as caught:
        make_entry(tmp_path, **options)
    assert repr(value) in str(caught.value) or str(value) in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("level", ["teacher", "entry"])
def test_links_out_of_the_cache(tmp_path: Path, entry: CacheEntry, level: str) -> None:
    outside = tmp_path / "outside"
    place = entry.folder if level == "entry" else entry.folder.parent
    place.rename(outside)
    place.symlink_to(outside)
    before = sorted(file.stat().st_mtime_ns for file in outside.rglob("*"))
    for use in (lambda: entry.compute(logits), entry.open):
        with pytest.raises(UserError, match=f"is a link to {outside}"):
            use()
    assert sorted(file.stat().st_mtime_ns for file in outside.rglob("*")) == before


def test_a_cache_may_lie_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "big-disk").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "big-disk")
    entry = make_entry(tmp_path / "cache")
    assert entry.compute(logits) == 4
    assert torch.equal(entry.open().read(torch.arange(37)), VALUES)


def test_links_in_place_of_files_are_not_written_through(tmp_path: Path, entry: CacheEntry) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    mine = f"{socket.gethostname()}-{os.getpid()}.partial"
    for name in ("key.json", "shard-00000.arrow", "shard-00000.json"):
        for file in (entry.folder / name, entry.folder / f"{name}.{mine}"):
            file.unlink(missing_ok=True)
            file.symlink_to(victim)
    assert entry.compute(logits) == 1
    assert victim.read_text() == "mine"
    assert torch.equal(entry.open().read(torch.arange(37)), VALUES)


@pytest.mark.parametrize("name", ["abc", "-1", "99999999999999999999", "1/../x", ""])
def test_strange_names_of_partial_files(entry: CacheEntry, name: str) -> None:
    strange = entry.folder / f"x.{socket.gethostname()}-{name.replace('/', '')}.partial"
    strange.write_text("")
    assert entry.compute(logits) == 0


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"{}", b'{"sha256": 1}', b'{"sha256": null}', b"\xff\0", b"[" * 3000, b" " * 100_000],
    ids=lambda content: repr(content[:8]),
)
def test_checksums_of_another_shape(entry: CacheEntry, content: bytes) -> None:
    (entry.folder / "shard-00001.json").write_bytes(content)
    with pytest.raises(UserError, match=r"shard-00001\.(json is no checksum|arrow was altered or cut off);"):
        entry.open()
    assert entry.compute(logits) == 1
    assert torch.equal(entry.open().read(torch.arange(37)), VALUES)


def test_devices_and_pipes_are_no_shards(entry: CacheEntry) -> None:
    for name in ("shard-00000.arrow", "shard-00001.json"):
        (entry.folder / name).unlink()
    os.mkfifo(entry.folder / "shard-00000.arrow")
    (entry.folder / "shard-00001.json").symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"shard-00000\.arrow is missing, shard-00001\.arrow is missing"):
        entry.open()


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b"[" * 100_000, b'{"a": {"b": 1}}', b'{"\\u001b[2J": 1, "weights": "' + b"x" * 5000 + b'"}'],
    ids=lambda content: repr(content[:8]),
)
def test_keys_of_another_shape(entry: CacheEntry, content: bytes) -> None:
    (entry.folder / "key.json").write_bytes(content)
    with pytest.raises(FileNotFoundError, match=r"no cached logits.*(key\.json is no key|differs in)") as caught:
        make_entry(entry.root, key={"weights": "2"}).open()
    assert len(str(caught.value)) < 2000
    assert "\x1b" not in str(caught.value)


def a_null(values: np.ndarray) -> pa.Table:
    array = pa.array([float(x) for x in values.ravel()[:-1]] + [None], pa.float32())
    return pa.table({"logits": pa.FixedSizeListArray.from_arrays(array, 5)})


CRAFTED: dict[str, Callable[[Path, np.ndarray], None]] = {
    "empty": lambda file, _: file.write_bytes(b"") and None,
    "no arrow": lambda file, _: file.write_bytes(b"\x80\x04cposix\nsystem\n") and None,
    "pickle": lambda file, _: file.write_bytes(b"\xff\xff\xff\xff\x10\0\0\0" + b"x" * 16) and None,
    "huge metadata": lambda file, _: file.write_bytes(b"\xff\xff\xff\xff\xff\xff\xff\x7f" + b"x" * 64) and None,
    "negative metadata": lambda file, _: file.write_bytes(b"\xff\xff\xff\xff\x00\x00\x00\x80" + b"x" * 64) and None,
    "fewer rows": lambda file, x: write(file, rows(x[:4])),
    "more rows": lambda file, x: write(file, rows(np.concatenate([x, x]))),
    "no rows": lambda file, x: write(file, rows(x[:0])),
    "two batches": lambda file, x: write(file, rows(x), batch_rows=5),
    "fewer classes": lambda file, x: write(file, rows(x[:, :4].copy())),
    "float64": lambda file, x: write(file, rows(x.astype(np.float64))),
    "integers": lambda file, x: write(file, rows(x.astype(np.int32))),
    "another column": lambda file, x: write(file, rows(x).rename_columns(["codes"])),
    "two columns": lambda file, x: write(file, rows(x).append_column("more", pa.array(range(10)))),
    "texts": lambda file, x: write(file, pa.table({"logits": ["a"] * 10})),
    "a null": lambda file, x: write(file, a_null(x)),
    "a null row": lambda file, x: write(file, pa.table({"logits": pa.array([None] * 10, pa.list_(pa.float32(), 5))})),
    "dictionary": lambda file, x: write(file, pa.table({"logits": pa.array(["a"] * 10).dictionary_encode()})),
    "compressed": lambda file, x: write(file, rows(np.zeros((10, 5), np.float32)), "zstd"),
    "a bomb": lambda file, x: write(file, rows(np.zeros((10_000_000, 5), np.float32)), "zstd"),
}


@pytest.mark.parametrize("kind", CRAFTED)
def test_shards_with_a_right_checksum(entry: CacheEntry, kind: str) -> None:
    file = entry.folder / "shard-00001.arrow"
    CRAFTED[kind](file, VALUES[10:20].numpy())
    sign(file)
    assert file.stat().st_size < 1_000_000
    before = psutil.Process().memory_info().rss
    with pytest.raises(UserError, match=r"shard-00001\.arrow (holds no logits of this cache: |has \d+ rows, this)"):
        entry.open()
    assert psutil.Process().memory_info().rss - before < 50e6


def test_lengths_that_lie(entry: CacheEntry) -> None:
    """Each word of the file's messages set to a large number: an error, or the values that are there."""
    file = entry.folder / "shard-00001.arrow"
    content = file.read_bytes()
    values = content.index(VALUES[10:20].numpy().tobytes())
    before = psutil.Process().memory_info().rss
    refused = 0
    for place in range(0, values, 4):
        for lie in (0x7FFFFFFF, 0x80000000, 1 << 20):
            file.write_bytes(content[:place] + lie.to_bytes(4, "little") + content[place + 4 :])
            sign(file)
            message = None
            try:
                read = entry.open().read(torch.arange(37))
            except UserError as error:
                message, refused = str(error), refused + 1
            assert "shard-00001.arrow" in message if message else torch.equal(read, VALUES)
    assert refused > 50
    assert psutil.Process().memory_info().rss - before < 50e6


def test_foreign_metadata_is_not_read(entry: CacheEntry) -> None:
    """A schema may carry any text of another library's."""
    table = rows(VALUES[10:20].numpy())
    schema = Features({"logits": List(Value("float32"), length=5)}).arrow_schema
    crafted = schema.with_metadata({"huggingface": "[" * 100_000, "pandas": "cposix\nsystem\n"})
    write(entry.folder / "shard-00001.arrow", pa.Table.from_arrays(table.columns, schema=crafted))
    assert torch.equal(entry.open().read(torch.arange(37)), VALUES)


def test_swapped_shards(entry: CacheEntry) -> None:
    """Shards of the same shape that are swapped without their checksums are noticed."""
    first, second = (entry.folder / f"shard-0000{i}.arrow" for i in (0, 1))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-00000\.arrow was altered.*shard-00001\.arrow was altered"):
        entry.open()


def test_digests_leave_out_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    digest = files_digest(tmp_path)
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "folder.json").mkdir()
    assert files_digest(tmp_path) == digest
