"""Lists of words with a label each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tables import write

from amtss_fast.data import DistillationCollator, encode, keep_labels, load_data, train_tokenizer

WORDS: list[dict[str, Any]] = [
    {"tokens": ["the", "red", "fox"], "tags": ["O", "A", "N"], "language": "en"},
    {"tokens": ["mvua"], "tags": ["N"], "language": "sw"},
    {"tokens": ["paka", "wawili"], "tags": None, "language": "sw"},
    {"tokens": ["paka", "mweusi"], "tags": ["N", None], "language": "sw"},
]


class TestWords:
    def load(self, tmp_path: Path, rows: list[dict[str, Any]] = WORDS, suffix: str = ".jsonl") -> Dataset:
        path = write(tmp_path / f"train{suffix}", rows)
        return load_data(path, text="tokens", label="tags")["train"]

    @pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
    def test_lists(self, tmp_path: Path, suffix: str) -> None:
        data = self.load(tmp_path, suffix=suffix)
        assert data.features["label"].feature.names == ["A", "N", "O"]
        assert data["text"][:] == [row["tokens"] for row in WORDS]
        assert data["label"][:] == [[2, 0, 1], [1], [-1, -1], [1, -1]]
        assert data["language"][:] == ["en", "sw", "sw", "sw"]
        # What `datasets` has written keeps its names, in their order.
        data.rename_columns({"text": "tokens", "label": "tags"}).to_parquet(tmp_path / "again" / "train.parquet")
        again = load_data(tmp_path / "again", text="tokens", label="tags")["train"]
        assert again[:] == data[:]
        assert again.features == data.features

    def test_a_token_for_each_label(self, tmp_path: Path) -> None:
        tokenizer = train_tokenizer(["the red fox mvua paka"], 400)
        rows = encode(self.load(tmp_path), tokenizer, languages=["en", "sw"], max_length=6)
        tokens = [tokenizer.convert_ids_to_tokens(ids) for ids in rows["input_ids"]]
        assert tokens[0] == ["[CLS]", "Ġthe", "Ġred", "Ġfox", "[SEP]"]
        assert rows[0]["labels"] == [-100, 2, 0, 1, -100]
        # The label of a word is that of its first piece, also where the last one is cut off.
        assert tokens[3] == ["[CLS]", "Ġpaka", "Ġ", "m", "w", "[SEP]"]
        assert rows[3]["labels"] == [-100, 1, -1, -100, -100, -100]
        batch = DistillationCollator(tokenizer)(list(rows.select([0, 1, 3])))
        assert batch["labels"].tolist() == [[-100, 2, 0, 1, -100, -100], [-100, 1, *[-100] * 4], rows[3]["labels"]]
        assert batch["labels"].dtype == torch.int64
        with pytest.raises(ValueError, match=r"labels of words need a fast tokenizer, .*\(no keep_text\)"):
            encode(self.load(tmp_path), tokenizer, languages=["en", "sw"], max_length=6, keep_text=True)

    def test_keep_labels(self, tmp_path: Path) -> None:
        data = self.load(tmp_path, WORDS * 10)
        kept = keep_labels(data, 0.5, seed=0)
        whole = [labels for labels in kept["label"] if max(labels) >= 0]
        # Half of the ten English and of the twenty labeled Swahili rows.
        assert len(whole) == 15
        assert sum(labels == [2, 0, 1] for labels in whole) == 5
        assert kept["text"][:] == data["text"][:]
        assert kept.features == data.features

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"tokens": ["a", "b"], "tags": ["N"]}, r"row 4 has 2 words and 1 labels in column 'tags'"),
            ({"tokens": [], "tags": []}, r"column 'tokens' has no word, or an empty one, in row 4"),
            ({"tokens": ["a", None], "tags": ["N", "N"]}, r"column 'tokens' has no word, or an empty one, in row 4"),
        ],
    )
    def test_wrong_rows(self, tmp_path: Path, row: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            self.load(tmp_path, [*WORDS, {**row, "language": "sw"}])

    def test_wrong_columns(self, tmp_path: Path) -> None:
        path = write(tmp_path / "train.jsonl", [{"tokens": ["a"], "text": "a", "ids": [1], "tags": ["N"], "label": 0}])
        options = {"language_default": "en"}
        with pytest.raises(ValueError, match=r"column 'ids' holds lists of int64, not of words"):
            load_data(path, text="ids", label="tags", **options)
        for text, label in (("tokens", "label"), ("text", "tags")):
            with pytest.raises(ValueError, match=r"either both hold lists, of words and of their labels, or none"):
                load_data(path, text=text, label=label, **options)
