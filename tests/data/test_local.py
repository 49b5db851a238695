"""Local files of each format, and the Hub, give one shape or a clear error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from tables import NLI, ROWS, translations, write

from amtss_fast.data import files, language_counts, load_data


class TestLocal:
    @pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".ndjson", ".parquet"])
    def test_formats(self, tmp_path: Path, suffix: str) -> None:
        rows = [row | {"text": row["text"].replace("\n", " ")} for row in ROWS] if suffix == ".tsv" else ROWS
        data = load_data(write(tmp_path / f"table{suffix}", rows))
        assert list(data) == ["train"]
        train = data["train"]
        assert train.column_names == ["text", "label", "language"]
        assert list(train["text"]) == [row["text"] for row in rows]
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
                patch.setattr(files, "_CHUNK", 3)
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
