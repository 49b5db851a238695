"""The embedded sets: sizes, splits by concept, licenses."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from tables import NLI
from tiny import tiny_tokenizer

from amtss_fast.data import encode, language_counts, load_data, sources

FIFTEEN = {"ar", "bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh"}


class TestEmbedded:
    def test_topic(self) -> None:
        start = time.perf_counter()
        data = load_data("cldr_topic", keep=["concept"])
        assert time.perf_counter() - start < 5
        assert {split: len(data[split]) for split in data} == {
            "train": 32010,
            "validation": 5078,
            "test": 8919,
        }
        assert sum(map(len, data.values())) == 46007
        assert data["train"].column_names == ["text", "label", "language", "concept"]
        names = data["test"].features["label"].names
        assert len(names) == 8
        assert names == sorted(names)
        concepts = {split: set(data[split]["concept"]) for split in data}
        assert not concepts["train"] & concepts["test"]
        assert not concepts["train"] & concepts["validation"]
        assert not concepts["validation"] & concepts["test"]
        for split in data:
            assert set(language_counts(data[split])) == FIFTEEN
            assert set(data[split]["label"]) == set(range(8))

    def test_topic_keeps_rows_and_labels(self) -> None:
        data = load_data("cldr_topic", keep=["label_name"], languages=["en"])
        names = data["train"].features["label"].names
        assert [names[i] for i in data["train"]["label"]] == list(data["train"]["label_name"])
        row = next(row for row in data["test"] if row["text"] == "grinning face")
        assert names[row["label"]] == "smileys-emotion"

    def test_pairs(self) -> None:
        data = load_data("cldr_pairs", keep=["pair_id"])
        assert sum(map(len, data.values())) == 137001
        assert data["train"].column_names == ["text", "text_pair", "label", "language", "pair_id"]
        assert data["train"].features["label"].names == NLI
        emoji = {}
        for split in data:
            ids = [pair_id.split("-") for pair_id in data[split]["pair_id"]]
            emoji[split] = {part for pair_id in ids for part in pair_id[2:]}
        assert not emoji["train"] & emoji["test"]
        assert not emoji["train"] & emoji["validation"]
        assert data["train"][0]["text"].startswith("teeth, smile")
        assert data["train"][0]["text_pair"] == "grinning face with big eyes"

    def test_licenses_and_no_restricted_data(self) -> None:
        folder = sources._EMBEDDED_FOLDER
        assert sorted(path.name for path in folder.iterdir()) == [
            "LICENSE-EMOJIBASE.txt",
            "LICENSE-UNICODE.txt",
            "README.md",
            "cldr_pairs.parquet",
            "cldr_topic.parquet",
            "languages.txt",
        ]
        assert "UNICODE LICENSE V3" in (folder / "LICENSE-UNICODE.txt").read_text("utf-8")
        assert "Permission is hereby granted" in (folder / "LICENSE-EMOJIBASE.txt").read_text("utf-8")

    def test_fingerprint_is_the_contents(self) -> None:
        here = load_data("cldr_topic", languages=["sw"])["train"]
        code = (
            "from amtss_fast.data import load_data, encode\n"
            "from tiny import tiny_tokenizer\n"
            "data = load_data('cldr_topic', languages=['sw'])['train']\n"
            "print(data._fingerprint, encode(data, tiny_tokenizer(), languages=['sw'],"
            " max_length=16)._fingerprint)"
        )
        out = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": ":".join(sys.path)},
        ).stdout.split()
        tokenizer = tiny_tokenizer()
        # A call leaves its truncation and padding in the tokenizer; the ids do not depend on them.
        tokenizer(["a", "b c d"], truncation=True, max_length=5, padding=True)
        assert out == [
            here._fingerprint,
            encode(here, tokenizer, languages=["sw"], max_length=16)._fingerprint,
        ]
        assert here._fingerprint != load_data("cldr_topic", languages=["en"])["train"]._fingerprint
