"""Token ids of texts, and batches of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from tables import NLI
from tiny import tiny_tokenizer

from amtss_fast.data import DistillationCollator, encode


class TestEncode:
    def data(self, pair: bool = True) -> DatasetDict:
        texts: dict[str, Any] = {"text": ["a red apple", "un gato"], "language": ["en", "es"]}
        if pair:
            texts["text_pair"] = ["the table", "duerme en la silla"]
        features = Features({name: Value("string") for name in texts})
        features["label"] = ClassLabel(names=NLI)
        return DatasetDict(train=Dataset.from_dict({**texts, "label": [2, -1]}, features=features))

    @pytest.mark.parametrize("pair", [False, True])
    def test_columns_and_ids(self, pair: bool) -> None:
        tokenizer = tiny_tokenizer()
        data = self.data(pair)
        encoded = encode(data, tokenizer, languages=["fr", "es", "en"], max_length=32)
        assert isinstance(encoded, DatasetDict)
        train = encoded["train"]
        assert set(train.column_names) == {
            "input_ids",
            "attention_mask",
            "token_type_ids",
            "language_ids",
            "labels",
        }
        row = data["train"][1]
        wanted = tokenizer(row["text"], row.get("text_pair"))
        assert train[1] == {**wanted, "language_ids": 1, "labels": -1}
        assert train[0]["language_ids"] == 2
        assert train[0]["labels"] == 2
        assert train.features["labels"].names == NLI
        assert train.cache_files == []

    def test_truncates(self) -> None:
        encoded = encode(self.data()["train"], tiny_tokenizer(), languages=["en", "es"], max_length=7)
        assert [len(ids) for ids in encoded["input_ids"]] == [7, 7]

    def test_no_token_types(self) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
        encoded = encode(self.data()["train"], tokenizer, languages=["en", "es"], max_length=16)
        assert "token_type_ids" not in encoded.column_names

    def test_fingerprint_tells_arguments_apart(self) -> None:
        data, tokenizer = self.data()["train"], tiny_tokenizer()
        both: dict[str, Any] = {"languages": ["en", "es"], "max_length": 16}
        prints = {
            encode(data, tokenizer, **both)._fingerprint,
            encode(data, tokenizer, **{**both, "max_length": 12})._fingerprint,
            encode(data, tokenizer, **{**both, "languages": ["es", "en"]})._fingerprint,
            encode(data, tiny_tokenizer(vocab_size=270), **both)._fingerprint,
            encode(data, tokenizer, **both, keep_text=True)._fingerprint,
            encode(data.select([0]), tokenizer, **both)._fingerprint,
        }
        assert len(prints) == 6
        assert encode(data, tokenizer, **both)._fingerprint in prints

    def test_fingerprint_is_that_of_the_ids(self) -> None:
        data = self.data()["train"]

        def fingerprint(**settings: Any) -> str:
            tokenizer = tiny_tokenizer()
            for name, value in settings.items():
                setattr(tokenizer, name, value)
            return encode(data, tokenizer, languages=["en", "es"], max_length=7)._fingerprint

        plain = fingerprint()
        assert fingerprint(padding_side="left") == plain
        assert fingerprint(truncation_side="left") != plain
        assert fingerprint(model_input_names=["input_ids", "attention_mask"]) != plain
        assert fingerprint(pad_token="[UNK]") != plain
        used = tiny_tokenizer()
        used(["a", "b c d"], truncation=True, max_length=5, padding="max_length")
        assert encode(data, used, languages=["en", "es"], max_length=7)._fingerprint == plain

    def test_errors(self) -> None:
        data, tokenizer = self.data()["train"], tiny_tokenizer(model_max_length=32)
        with pytest.raises(ValueError, match=r"\['es'\]; rows per language: {'en': 1, 'es': 1}"):
            encode(data, tokenizer, languages=["en"], max_length=16)
        for length in (3, 33):
            with pytest.raises(ValueError, match=rf"above 3 .* at most 32 .* not {length}"):
                encode(data, tokenizer, languages=["en", "es"], max_length=length)

    @pytest.mark.parametrize("keep_text", [False, True])
    def test_collator(self, keep_text: bool) -> None:
        tokenizer = tiny_tokenizer()
        encoded = encode(
            self.data()["train"],
            tokenizer,
            languages=["en", "es"],
            max_length=32,
            keep_text=keep_text,
        )
        batch = DistillationCollator(tokenizer, keep_text, pad_to_multiple_of=8)([*encoded])
        texts = {"text", "text_pair"} if keep_text else set()
        ids = {"input_ids", "attention_mask", "token_type_ids", "language_ids", "labels"}
        assert set(batch) == ids | texts
        width = max(map(len, encoded["input_ids"]))
        assert batch["input_ids"].shape == (2, -(-width // 8) * 8)
        assert {batch[name].dtype for name in ids} == {torch.int64}
        for n, row in enumerate(encoded):
            length = len(row["input_ids"])
            assert batch["input_ids"][n, :length].tolist() == row["input_ids"]
            assert batch["input_ids"][n, length:].eq(tokenizer.pad_token_id).all()
            assert batch["attention_mask"][n].sum() == length
        assert batch["language_ids"].tolist() == [0, 1]
        assert batch["labels"].tolist() == [2, -1]
        if keep_text:
            assert batch["text"] == ["a red apple", "un gato"]
            assert batch["text_pair"] == ["the table", "duerme en la silla"]

    def test_collator_without_text(self) -> None:
        tokenizer = tiny_tokenizer()
        encoded = encode(self.data()["train"], tokenizer, languages=["en", "es"], max_length=32)
        with pytest.raises(ValueError, match="encode the data with keep_text=True"):
            DistillationCollator(tokenizer, keep_text=True)([*encoded])
