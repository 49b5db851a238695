"""Labels as ids and names, of texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from tables import NLI, write

from amtss_fast.data import load_data
from amtss_fast.errors import UserError


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
        with pytest.raises(UserError, match=r"label_names=\['a', 'b'\] differ.*'entailment', 'neutral'"):
            load_data(path, label_names=["a", "b"])

    def test_no_labels(self, tmp_path: Path) -> None:
        path = write(tmp_path / "train.csv", [{"text": "x", "language": "en"}])
        assert list(load_data(path, label=None, label_names=["a", "b"])["train"]["label"]) == [-1]
        with pytest.raises(UserError, match=r"label=None .* needs label_names"):
            load_data(path, label=None)
        with pytest.raises(UserError, match=r"no row has a label; give label_names"):
            self.load(tmp_path, [None, None])

    @pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
    def test_errors(self, tmp_path: Path, suffix: str) -> None:
        with pytest.raises(UserError, match=r"outside the label names: \['maybe'\]; .*\['entail"):
            self.load(tmp_path, ["neutral", "maybe"], suffix, label_names=NLI)
        with pytest.raises(UserError, match=r"outside \[0, 3\): \[3, 7\]; .*\['entailment'.*unlabeled"):
            self.load(tmp_path, [0, 7, 3], suffix, label_names=NLI)
        with pytest.raises(UserError, match=r"outside \[0, 3\): \[-2\]"):
            self.load(tmp_path, [0, -2], suffix, label_names=NLI)
        with pytest.raises(UserError, match=r"ids \[1, 2, 5\] are not 0, 1, .* label_names"):
            self.load(tmp_path, [1, 2, 5], suffix)

    def test_wrong_kinds(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"not ids or names: \['0\.5'\]"):
            self.load(tmp_path, [0.5, 1.0])
        with pytest.raises(UserError, match="either both hold lists"):
            self.load(tmp_path, [[1], [2]])
        with pytest.raises(UserError, match="neither ids nor names"):
            self.load(tmp_path, [{"good": 1}, {"good": 0}])
        write(tmp_path / "train.jsonl", [{"text": "x", "label": 1, "language": "en"}])
        write(tmp_path / "test.jsonl", [{"text": "x", "label": "a", "language": "en"}])
        with pytest.raises(UserError, match=r"ids in one split and names in another"):
            load_data(tmp_path)
        with pytest.raises(UserError, match="a name twice"):
            load_data(tmp_path, label_names=["a", "a"])
