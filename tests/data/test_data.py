"""Every way in (embedded, Hub, local files of each format) ends in one shape, or in a clear error."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from tiny import tiny_tokenizer

from amtss_fast.data import sources
from amtss_fast.data.load import (
    DistillationCollator,
    encode,
    keep_labels,
    language_counts,
    load_data,
    split_data,
)
from amtss_fast.runs.run import train_tokenizer

NLI = ["entailment", "neutral", "contradiction"]
FIFTEEN = {"ar", "bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh"}
ROWS: list[dict[str, Any]] = [
    {"text": "a red apple", "label": "good", "language": "en"},
    {"text": "NA", "label": "bad", "language": "en"},
    {"text": "paka, mwekundu\nna mzuri", "label": None, "language": "sw"},
    {"text": "2020-01-01", "label": "good", "language": "sw"},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes rows in the format that the path's suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".jsonl", ".json", ".ndjson"):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def translations(count: int = 4) -> Dataset:
    """XNLI's `all_languages` configuration in small: premise and hypothesis in three languages."""
    codes = ["en", "sw", "ur"]
    features = Features(
        {
            "premise": datasets.Translation(languages=codes),
            "hypothesis": datasets.TranslationVariableLanguages(languages=codes),
            "label": ClassLabel(names=NLI),
        }
    )
    rows = {
        "premise": [{code: f"premise {i} {code}" for code in codes} for i in range(count)],
        # Each row in another order of languages.
        "hypothesis": [
            {
                "language": [codes[(i + j) % 3] for j in range(3)],
                "translation": [f"hypothesis {i} {codes[(i + j) % 3]}" for j in range(3)],
            }
            for i in range(count)
        ],
        "label": [i % 3 for i in range(count)],
    }
    return Dataset.from_dict(rows, features=features)


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

    def test_licences_and_no_restricted_data(self) -> None:
        folder = sources._EMBEDDED_FOLDER
        assert sorted(path.name for path in folder.iterdir()) == [
            "LICENSE-EMOJIBASE.txt",
            "LICENSE-UNICODE.txt",
            "README.md",
            "cldr_pairs.parquet",
            "cldr_topic.parquet",
        ]
        assert "UNICODE LICENSE V3" in (folder / "LICENSE-UNICODE.txt").read_text("utf-8")
        assert "Permission is hereby granted" in (folder / "LICENSE-EMOJIBASE.txt").read_text("utf-8")

    def test_fingerprint_is_the_contents(self) -> None:
        here = load_data("cldr_topic", languages=["sw"])["train"]
        code = (
            "from amtss_fast.data.load import load_data, encode\n"
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


class TestLocal:
    @pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".ndjson", ".parquet"])
    def test_formats(self, tmp_path: Path, suffix: str) -> None:
        data = load_data(write(tmp_path / f"table{suffix}", ROWS))
        assert list(data) == ["train"]
        train = data["train"]
        assert train.column_names == ["text", "label", "language"]
        assert list(train["text"]) == [row["text"] for row in ROWS]
        assert list(train["language"]) == ["en", "en", "sw", "sw"]
        assert train.features["label"].names == ["bad", "good"]
        assert list(train["label"]) == [1, 0, -1, 1]
        assert train.features["text"] == Value("string")

    def test_rows_across_blocks(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = [
            {"text": f"{i},\n\nb" * (i % 5 + 1), "label": None if i < 9 else "x", "language": "en"} for i in range(40)
        ]
        for suffix in (".csv", ".jsonl"):
            whole = load_data(write(tmp_path / f"table{suffix}", rows))["train"]
            with monkeypatch.context() as patch:
                patch.setattr(sources, "_CSV_BLOCK", 64)
                patch.setattr(sources, "_JSON_CHUNK", 3)
                pieces = load_data(tmp_path / f"table{suffix}")["train"]
            assert list(pieces["text"]) == [row["text"] for row in rows]
            assert list(pieces["label"]) == [-1] * 9 + [0] * 31
            assert pieces._fingerprint == whole._fingerprint

    @pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
    def test_two_texts_by_name(self, tmp_path: Path, suffix: str) -> None:
        rows = [
            {"a": "x", "b": "y", "gold": 1, "code": "de", "id": 7},
            {"a": "z", "b": "", "gold": 0, "code": "fr", "id": 8},
        ]
        data = load_data(
            str(write(tmp_path / f"test{suffix}", rows)),
            text="a",
            text_pair="b",
            label="gold",
            language="code",
            label_names=["no", "yes"],
            keep=["id"],
        )
        assert list(data) == ["test"]
        assert data["test"].column_names == ["text", "text_pair", "label", "language", "id"]
        assert list(data["test"]["text_pair"]) == ["y", ""]
        assert list(data["test"]["label"]) == [1, 0]
        assert data["test"].features["label"].names == ["no", "yes"]
        assert [int(i) for i in data["test"]["id"]] == [7, 8]

    def test_splits_by_file_name(self, tmp_path: Path) -> None:
        for name in ("my-train-00000-of-00002", "my-train-00001-of-00002", "my.dev", "sub/test"):
            write(tmp_path / f"{name}.jsonl", ROWS)
        data = load_data(tmp_path)
        assert {split: len(data[split]) for split in data} == {
            "train": 8,
            "validation": 4,
            "test": 4,
        }
        assert list(data) == ["train", "validation", "test"]
        assert list(load_data(tmp_path, splits=["test"])) == ["test"]
        renamed = load_data(tmp_path, splits={"train": "validation", "test": "test"})
        assert {split: len(renamed[split]) for split in renamed} == {"train": 4, "test": 4}
        assert load_data(str(tmp_path / "my*.jsonl"), splits=["train"])["train"].num_rows == 8

    def test_splits_by_mapping_and_column(self, tmp_path: Path) -> None:
        first, second = (write(tmp_path / name, ROWS) for name in ("a.csv", "b.csv"))
        data = load_data({"train": [first, second], "test": second})
        assert {split: len(data[split]) for split in data} == {"train": 8, "test": 4}
        rows = [{**row, "split": split} for split in ("test", "train") for row in ROWS]
        path = write(tmp_path / "all.csv", rows)
        assert {split: len(part) for split, part in load_data(path).items()} == {
            "train": 4,
            "test": 4,
        }
        assert list(load_data(path, split_column=None)) == ["train"]

    def test_language_by_path(self, tmp_path: Path) -> None:
        rows = [{"text": "x", "label": "a"}, {"text": "y", "label": "b"}]
        write(tmp_path / "en" / "train-00000-of-00001.parquet", rows)
        write(tmp_path / "sw" / "train.parquet", rows)
        write(tmp_path / "test.pt-BR.parquet", rows)
        data = load_data(tmp_path)
        assert language_counts(data["train"]) == {"en": 2, "sw": 2}
        assert language_counts(data["test"]) == {"pt-BR": 2}

    def test_language_default(self, tmp_path: Path) -> None:
        path = write(tmp_path / "train.csv", [{"text": "x", "label": "a"}, {"text": "y", "label": "b"}])
        assert language_counts(load_data(path, language_default="fi")["train"]) == {"fi": 2}
        with pytest.raises(ValueError, match=r"no column 'language'.*\['text', 'label'\].*language_default"):
            load_data(path)
        with pytest.raises(ValueError, match="language_default='fi' is not clear"):
            load_data(write(tmp_path / "other.csv", ROWS), language_default="fi")
        data = load_data(tmp_path / "other.csv", language=None, language_default="fi")
        assert language_counts(data["train"]) == {"fi": 4}

    def test_languages(self, tmp_path: Path) -> None:
        path = write(tmp_path / "train.csv", ROWS)
        assert set(load_data(path, languages=["sw"])["train"]["language"]) == {"sw"}
        with pytest.raises(ValueError, match=r"languages \['xx'\]; .*'en': 2, 'sw': 2"):
            load_data(path, languages=["en", "xx"])

    def test_xnli_shape(self, tmp_path: Path) -> None:
        for split in ("train", "test"):
            translations().to_parquet(tmp_path / "all_languages" / f"{split}-00000-of-00001.parquet")
        data = load_data(tmp_path)
        assert list(data) == ["train", "test"]
        train = data["train"]
        assert train.column_names == ["text", "text_pair", "label", "language"]
        assert train.features["label"].names == NLI
        assert len(train) == 12
        # One row per language, beside each other, text and text_pair of the same language.
        for n, row in enumerate(train):
            assert row["text"] == f"premise {n // 3} {row['language']}"
            assert row["text_pair"] == f"hypothesis {n // 3} {row['language']}"
            assert row["label"] == (n // 3) % 3
        assert language_counts(load_data(tmp_path, languages=["ur"])["test"]) == {"ur": 4}

    def test_xnli_shape_with_gaps(self, tmp_path: Path) -> None:
        rows = [
            {
                "premise": {"en": "p0", "sw": "q0"},
                "hypothesis": {"language": ["sw"], "translation": ["s0"]},
            },
            {
                "premise": {"en": "p1", "sw": None},
                "hypothesis": {
                    "language": ["sw", "en", "en"],
                    "translation": ["s1", "e1", "twice"],
                },
            },
        ]
        path = write(tmp_path / "x.jsonl", [{**row, "label": n} for n, row in enumerate(rows)])
        found = [(r["text"], r["text_pair"], r["language"], r["label"]) for r in load_data(path)["train"]]
        assert found == [("q0", "s0", "sw", 0), ("p1", "e1", "en", 1)]
        with pytest.raises(ValueError, match="only one holds translations"):
            load_data(write(tmp_path / "y.jsonl", [{"premise": {"en": "a"}, "hypothesis": "b", "label": 0}]))

    def test_xnli_shape_without_rows(self, tmp_path: Path) -> None:
        translations().select([]).to_parquet(tmp_path / "train.parquet")
        with pytest.raises(ValueError, match=r"train\.parquet is empty"):
            load_data(tmp_path)

    def test_plain_and_translated_tables_do_not_mix(self, tmp_path: Path) -> None:
        translations().to_parquet(tmp_path / "all_languages" / "train.parquet")
        write(tmp_path / "en" / "train.parquet", [{"premise": "a", "hypothesis": "b", "label": 0}])
        with pytest.raises(ValueError, match=r"differ in kind.*all_languages.*en/train"):
            load_data(tmp_path)

    def test_json_keys_that_come_late(self, tmp_path: Path) -> None:
        rows = [{"text": "a", "language": "en"}, {"text": "b", "language": "en", "label": "x"}]
        data = load_data(write(tmp_path / "train.jsonl", rows))
        assert list(data["train"]["label"]) == [-1, 0]


class TestLabels:
    def load(self, tmp_path: Path, labels: list[Any], suffix: str = ".jsonl", **options: Any) -> Dataset:
        rows = [{"text": "x", "label": label, "language": "en"} for label in labels]
        return load_data(write(tmp_path / f"train{suffix}", rows), **options)["train"]

    @pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
    def test_ids(self, tmp_path: Path, suffix: str) -> None:
        data = self.load(tmp_path, [1, 0, None, -1, 2], suffix)
        assert list(data["label"]) == [1, 0, -1, -1, 2]
        assert data.features["label"].names == ["0", "1", "2"]

    def test_floats_bools_and_digits_as_names(self, tmp_path: Path) -> None:
        assert list(self.load(tmp_path, [1.0, float("nan"), 0.0], ".parquet")["label"]) == [
            1,
            -1,
            0,
        ]
        assert list(self.load(tmp_path, [True, False])["label"]) == [1, 0]
        data = self.load(tmp_path, ["5", "1", "5"], label_names=["1", "5"])
        assert list(data["label"]) == [1, 0, 1]

    def test_names_in_the_order_given(self, tmp_path: Path) -> None:
        data = self.load(tmp_path, ["neutral", "entailment", ""], ".csv", label_names=NLI)
        assert list(data["label"]) == [1, 0, -1]
        assert data.features["label"].names == NLI

    def test_own_names(self, tmp_path: Path) -> None:
        features = Features({"text": Value("string"), "label": ClassLabel(names=NLI), "language": Value("string")})
        table = {"text": ["a", "b", "c"], "label": [2, 0, -1], "language": ["en"] * 3}
        path = tmp_path / "train.parquet"
        Dataset.from_dict(table, features=features).to_parquet(path)
        assert load_data(path)["train"].features["label"].names == NLI
        other = load_data(path, label_names=NLI[::-1])["train"]
        assert other.features["label"].names == NLI[::-1]
        assert list(other["label"]) == [0, 2, -1]
        with pytest.raises(ValueError, match=r"label_names=\['a', 'b'\] differ.*'entailment', 'neutral'"):
            load_data(path, label_names=["a", "b"])

    def test_no_labels(self, tmp_path: Path) -> None:
        path = write(tmp_path / "train.csv", [{"text": "x", "language": "en"}])
        assert list(load_data(path, label=None, label_names=["a", "b"])["train"]["label"]) == [-1]
        with pytest.raises(ValueError, match=r"label=None .* needs label_names"):
            load_data(path, label=None)
        with pytest.raises(ValueError, match=r"no row has a label; give label_names"):
            self.load(tmp_path, [None, None])

    @pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
    def test_errors(self, tmp_path: Path, suffix: str) -> None:
        with pytest.raises(ValueError, match=r"outside the label names: \['maybe'\]; .*\['entail"):
            self.load(tmp_path, ["neutral", "maybe"], suffix, label_names=NLI)
        with pytest.raises(ValueError, match=r"outside \[0, 3\): \[3, 7\]; .*\['entailment'.*unlabelled"):
            self.load(tmp_path, [0, 7, 3], suffix, label_names=NLI)
        with pytest.raises(ValueError, match=r"outside \[0, 3\): \[-2\]"):
            self.load(tmp_path, [0, -2], suffix, label_names=NLI)
        with pytest.raises(ValueError, match=r"ids \[1, 2, 5\] are not 0, 1, .* label_names"):
            self.load(tmp_path, [1, 2, 5], suffix)

    def test_wrong_kinds(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"not ids or names: \[0\.5\]"):
            self.load(tmp_path, [0.5, 1.0])
        with pytest.raises(ValueError, match="either both hold lists"):
            self.load(tmp_path, [[1], [2]])
        with pytest.raises(ValueError, match="neither ids nor names"):
            self.load(tmp_path, [{"good": 1}, {"good": 0}])
        write(tmp_path / "train.jsonl", [{"text": "x", "label": 1, "language": "en"}])
        write(tmp_path / "test.jsonl", [{"text": "x", "label": "a", "language": "en"}])
        with pytest.raises(ValueError, match=r"ids in one split and names in another"):
            load_data(tmp_path)
        with pytest.raises(ValueError, match="a name twice"):
            load_data(tmp_path, label_names=["a", "a"])


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
        # Half of the ten English and of the twenty labelled Swahili rows.
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


class TestErrors:
    @pytest.mark.parametrize("argument", ["text", "text_pair", "label", "keep"])
    def test_missing_column(self, tmp_path: Path, argument: str) -> None:
        options: dict[str, Any] = {argument: ["nope"] if argument == "keep" else "nope"}
        if argument == "text_pair":
            options["text"] = "text"
        with pytest.raises(ValueError, match=rf"no column 'nope' \(argument {argument}\).*'language'\]"):
            load_data(write(tmp_path / "t.csv", ROWS), **options)

    def test_files(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no file or folder.*cldr_pairs"):
            load_data(tmp_path / "nope.csv")
        with pytest.raises(FileNotFoundError, match=r"no file or folder 'nope\.csv'"):
            load_data("nope.csv")
        (tmp_path / "notes.txt").write_text("x")
        with pytest.raises(ValueError, match=r"unknown format '.txt'; known are \['.csv'"):
            load_data(tmp_path / "notes.txt")
        with pytest.raises(FileNotFoundError, match=r"no file in a known format.*notes.txt"):
            load_data(tmp_path)
        write(tmp_path / "train.csv", ROWS)
        write(tmp_path / "train.jsonl", ROWS)
        with pytest.raises(ValueError, match=r"mixes the formats \['.csv', '.jsonl'\]"):
            load_data(tmp_path)

    def test_splits(self, tmp_path: Path) -> None:
        path = write(tmp_path / "train.csv", ROWS)
        with pytest.raises(ValueError, match=r"no split \['test'\]; it has \['train'\]"):
            load_data(path, splits=["test"])
        write(tmp_path / "more.csv", ROWS)
        with pytest.raises(ValueError, match=r"more.csv names no split, but .*train.csv.*mapping"):
            load_data(tmp_path)
        write(tmp_path / "more.csv", ROWS).rename(tmp_path / "train_test.csv")
        with pytest.raises(ValueError, match=r"several splits: \['test', 'train'\]"):
            load_data(tmp_path)

    def test_empty_split(self, tmp_path: Path) -> None:
        write(tmp_path / "train.csv", ROWS)
        write(tmp_path / "test.csv", ROWS[:2])
        with pytest.raises(ValueError, match=r"split 'test' is empty; .*'train': {'sw': 2}"):
            load_data(tmp_path, languages=["sw"])
        (tmp_path / "test.csv").write_text("text,label,language\n")
        with pytest.raises(ValueError, match="split 'test' is empty"):
            load_data(tmp_path)
        (tmp_path / "test.csv").write_text("")
        with pytest.raises(ValueError, match=r"test\.csv is empty"):
            load_data(tmp_path)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b'{"text": "a"\n', r"x.jsonl, line 1 is not JSON"),
            (b'{"text": "a"}\n[1]\n', r"x.jsonl, line 2 is not a JSON object.*\[1\]"),
            (b"\xff\xfe\n", r"x.jsonl cannot be read as .jsonl"),
            (b'{"label": 1}\n{"label": "a"}\n', r"x.jsonl cannot be read"),
        ],
    )
    def test_broken_json(self, tmp_path: Path, content: bytes, message: str) -> None:
        (tmp_path / "x.jsonl").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_data(tmp_path / "x.jsonl")

    @pytest.mark.parametrize("suffix", ["csv", "parquet"])
    def test_broken_tables(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"x.{suffix}"
        path.write_bytes(b"text,label\n1,2,3\n")
        with pytest.raises(ValueError, match=rf"x.{suffix} cannot be read as .{suffix}"):
            load_data(path)

    def test_columns(self, tmp_path: Path) -> None:
        path = tmp_path / "x.csv"
        path.write_text("text,text\na,b\n")
        with pytest.raises(ValueError, match=r"columns twice: \['text'\]"):
            load_data(path)
        path = write(tmp_path / "x.jsonl", [{"text": 3, "label": 0, "language": "en"}])
        with pytest.raises(ValueError, match="column 'text' holds int64, not text"):
            load_data(path)
        write(path, [*ROWS, {"text": None, "label": "good", "language": "en"}])
        with pytest.raises(ValueError, match="column 'text' has 1 empty values, the first in row 4"):
            load_data(path)
        path = write(tmp_path / "y.csv", [{"text": "a", "label": 0, "language": None}])
        with pytest.raises(ValueError, match="column 'language' has 1 empty values"):
            load_data(path)

    def test_arguments(self, tmp_path: Path) -> None:
        path = write(tmp_path / "t.csv", ROWS)
        with pytest.raises(TypeError, match="languages and keep are sequences"):
            load_data(path, languages="en")
        with pytest.raises(TypeError, match="splits is a sequence or a mapping"):
            load_data(path, splits="train")
        with pytest.raises(TypeError, match=r"takes no Hub arguments: .*'revision': 'main'"):
            load_data(path, revision="main")
        with pytest.raises(TypeError, match=r"'cldr_topic' .*takes no Hub arguments: .*'config': 'en'"):
            load_data("cldr_topic", config="en")
        with pytest.raises(ValueError, match="text_pair='b' needs text"):
            load_data(path, text_pair="b")


class TestHub:
    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
        """`datasets.load_dataset` with the layout of facebook/xnli in place of the network."""
        calls: list[tuple[Any, ...]] = []

        def load_dataset(name: str, config: str | None = None, **options: Any) -> DatasetDict:
            calls.append((name, config, options))
            if name == "nobody/nothing":
                raise datasets.exceptions.DatasetNotFoundError("doesn't exist on the Hub")
            if config == "all_languages":
                return DatasetDict({split: translations() for split in ("train", "test", "validation")})
            features = Features(
                {
                    "premise": Value("string"),
                    "hypothesis": Value("string"),
                    "label": ClassLabel(names=NLI),
                    "lang": ClassLabel(names=["de", "fr"]),
                }
            )
            rows = {
                "premise": ["a", "b"],
                "hypothesis": ["c", "d"],
                "label": [2, 0],
                "lang": [1, 0],
            }
            return DatasetDict({"train": Dataset.from_dict(rows, features=features).select([1, 0])})

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    def test_xnli(self, calls: list[tuple[Any, ...]]) -> None:
        data = load_data("xnli", revision="abc")
        assert calls == [("facebook/xnli", "all_languages", {"revision": "abc"})]
        assert list(data) == ["train", "validation", "test"]
        assert language_counts(data["test"]) == {"en": 4, "sw": 4, "ur": 4}
        assert data["test"].features["label"].names == NLI

    def test_xnli_languages(self, calls: list[tuple[Any, ...]]) -> None:
        data = load_data("xnli", languages=["sw", "ur"])
        assert [call[1] for call in calls] == ["sw", "ur"]
        assert list(data["train"]["language"]) == ["sw", "sw", "ur", "ur"]
        assert list(data["train"]["label"]) == [0, 2, 0, 2]
        assert language_counts(load_data("facebook/xnli", config="de")["train"]) == {"de": 2}
        with pytest.raises(ValueError, match=r"XNLI has no \['xx'\]; it has \['all_languages', 'ar'"):
            load_data("xnli", languages=["xx"])

    def test_any_set(self, calls: list[tuple[Any, ...]]) -> None:
        data = load_data("someone/set", text="premise", language="lang", config="small")
        assert calls == [("someone/set", "small", {})]
        assert data["train"].to_dict() == {
            "text": ["b", "a"],
            "label": [0, 2],
            "language": ["de", "fr"],
        }
        with pytest.raises(FileNotFoundError, match=r"'nobody/nothing'.*\['cldr_pairs', 'cldr_topic'\]"):
            load_data("nobody/nothing")
        with pytest.raises(TypeError, match="takes no split=; use splits="):
            load_data("someone/set", split="train")


class TestKeepLabels:
    def data(self, counts: dict[tuple[str, int], int]) -> Dataset:
        rows = [key for key, count in counts.items() for _ in range(count)]
        rows = [rows[i] for i in np.random.default_rng(3).permutation(len(rows))]
        return Dataset.from_dict(
            {
                "text": [str(i) for i in range(len(rows))],
                "label": [label for _, label in rows],
                "language": [code for code, _ in rows],
            },
            features=Features(
                {
                    "text": Value("string"),
                    "label": ClassLabel(names=["a", "b", "c"]),
                    "language": Value("string"),
                }
            ),
        )

    def test_shares(self) -> None:
        counts = {("en", 0): 100, ("en", 1): 40, ("sw", 0): 33, ("sw", 2): 2, ("sw", -1): 50}
        data = self.data(counts)
        kept = keep_labels(data, 0.1, seed=1)
        assert list(kept["text"]) == list(data["text"])
        assert kept.features == data.features
        pairs = zip(kept["language"], kept["label"], data["label"], strict=True)
        found = Counter((code, label) for code, label, before in pairs if label != -1 and label == before)
        # 10 % of 175 is 18 rows; ("sw", 2) must not lose its last label.
        assert found == {("en", 0): 10, ("en", 1): 4, ("sw", 0): 3, ("sw", 2): 1}
        assert sum(label != -1 for label in kept["label"]) == 18

    def test_total_is_the_fraction(self) -> None:
        data = self.data({(code, label): 7 for code in "uvwxyz" for label in range(3)})
        kept = keep_labels(data, 0.5, seed=0)
        assert sum(label != -1 for label in kept["label"]) == 63

    def test_deterministic(self) -> None:
        data = load_data("cldr_topic")["train"]
        one, two = (keep_labels(data, 0.1, seed=5) for _ in range(2))
        assert list(one["label"]) == list(two["label"])
        assert one._fingerprint == two._fingerprint
        assert list(one["label"]) != list(keep_labels(data, 0.1, seed=6)["label"])
        kept = one.filter(lambda label: label >= 0, input_columns="label")
        assert len(kept) == 3201
        assert {(row["language"], row["label"]) for row in kept} == {(row["language"], row["label"]) for row in data}

    def test_ends(self) -> None:
        data = self.data({("en", 0): 5, ("en", -1): 5})
        assert set(keep_labels(data, 0.0, seed=0)["label"]) == {-1}
        assert list(keep_labels(data, 1.0, seed=0)["label"]) == list(data["label"])
        assert sum(label == 0 for label in keep_labels(data, 0.001, seed=0)["label"]) == 1
        assert set(keep_labels(data.filter(lambda row: row["label"] < 0), 0.5, seed=0)["label"]) == {-1}

    def test_errors(self) -> None:
        data = self.data({("en", 0): 5})
        with pytest.raises(ValueError, match=r"in \[0, 1\], not 1.5"):
            keep_labels(data, 1.5, seed=0)
        with pytest.raises(ValueError, match=r"no column 'concept'.*\['text', 'label', 'language'\]"):
            keep_labels(data, 0.5, seed=0, per=("concept",))
        with pytest.raises(TypeError, match=r"one split, for example data\['train'\]"):
            keep_labels(DatasetDict(train=data), 0.5, seed=0)


class TestSplitData:
    def test_rows(self) -> None:
        data = load_data("cldr_topic", languages=["en"])["test"]
        split = split_data(data, validation=0.2, test=0.1, seed=0)
        assert list(split) == ["train", "validation", "test"]
        assert len(split["validation"]) == round(0.2 * len(data))
        rows = Counter(row["text"] for part in split.values() for row in part)
        assert rows == Counter(data["text"])
        again = split_data(data, validation=0.2, test=0.1, seed=0)
        assert list(again["test"]["text"]) == list(split["test"]["text"])
        assert list(split_data(data, validation=0, seed=0)) == ["train", "test"]

    def test_by(self) -> None:
        data = load_data("cldr_topic", languages=["en", "sw"], keep=["concept"])["test"]
        split = split_data(data, validation=0.2, test=0.3, seed=0, by="concept")
        concepts = [set(part["concept"]) for part in split.values()]
        assert sum(map(len, concepts)) == len(set(data["concept"]))
        assert not set.union(*concepts) - set(data["concept"])
        assert sum(map(len, split.values())) == len(data)

    def test_errors(self) -> None:
        data = load_data("cldr_topic", languages=["en"])["test"]
        with pytest.raises(ValueError, match=r"below 1 together, not 0.5 and 0.5"):
            split_data(data, validation=0.5, test=0.5, seed=0)
        with pytest.raises(ValueError, match="no column 'emoji'"):
            split_data(data, seed=0, by="emoji")
        with pytest.raises(ValueError, match="split 'validation' is empty: 3 rows are too few"):
            split_data(data.select(range(3)), seed=0)


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
