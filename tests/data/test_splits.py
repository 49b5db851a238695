"""Random splits, and labels that are hidden."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from amtss_fast.data import keep_labels, load_data, split_data


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
