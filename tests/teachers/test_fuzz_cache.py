"""Files of a cache entry and of a student with wrong bytes: the same values, or an error that names the file."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fuzz import outcome
from hypothesis import given
from hypothesis import strategies as st
from test_cache import VALUES, logits, make_entry
from tiny import tiny_bert_config, tiny_tokenizer

from amtss_fast.errors import UserError
from amtss_fast.models import AMTSSForSequenceClassification

PLACES = st.integers(0, 1 << 20)
EDITS: st.SearchStrategy[Callable[[bytes], bytes]] = st.one_of(
    st.builds(lambda place: lambda data: data[: place % len(data)], PLACES),
    st.builds(
        lambda place, byte: lambda data: data[: place % len(data)] + bytes([byte]) + data[place % len(data) + 1 :],
        PLACES,
        st.integers(0, 255),
    ),
    st.builds(
        lambda place, more: lambda data: data[: place % len(data)] + more + data[place % len(data) :],
        PLACES,
        st.binary(min_size=1, max_size=8),
    ),
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cache")
    make_entry(root).compute(logits)
    return root


@given(edit=EDITS, name=st.sampled_from(["key.json", "shard-00001.arrow", "shard-00001.json"]))
def test_a_cache_with_wrong_bytes(cache: Path, edit: Callable[[bytes], bytes], name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "cache"
        shutil.copytree(cache, root)
        entry = make_entry(root)
        file = entry.folder / name
        file.write_bytes(edit(file.read_bytes()))
        message = None
        try:
            read = entry.open().read(torch.arange(37))
        except UserError as error:
            message = str(error)
        outcome(f"cache {name}", "UserError" if message else "right")
        assert "shard-00001" in message if message else torch.equal(read, VALUES)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    tokenizer = tiny_tokenizer()
    AMTSSForSequenceClassification.from_encoder(
        tiny_bert_config(len(tokenizer), num_hidden_layers=1), languages=["en"], num_labels=2
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@given(edit=EDITS, head=st.booleans())
def test_weights_with_wrong_bytes(student: Path, edit: Callable[[bytes], bytes], head: bool) -> None:
    """safetensors has no checksum: a flipped byte of a weight is another weight. Only the structure is checked."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "student"
        shutil.copytree(student, place)
        file = place / "model.safetensors"
        data = file.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little") if head else len(data)
        file.write_bytes(edit(data[:start]) + data[start:])
        message, shapes = None, None
        try:
            shapes = {k: v.shape for k, v in AMTSSForSequenceClassification.from_pretrained(place).state_dict().items()}
        except UserError as error:
            message = str(error)
        outcome("student model.safetensors", "UserError" if message else "right")
        if message is not None:
            assert str(place) in message
        else:
            whole = AMTSSForSequenceClassification.from_pretrained(student).state_dict()
            assert shapes == {k: v.shape for k, v in whole.items()}
