"""One meaning of labels in every format and Arrow type, and in every place where a model meets new labels."""

from __future__ import annotations

import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from tables import write

from amtss_fast.data import align_labels, load_data
from amtss_fast.errors import UserError

NAMES = ["neg", "pos"]


def load(folder: Path, labels: list[Any], suffix: str = ".jsonl", **options: Any) -> tuple[list[str], list[int]]:
    """The names of the classes, and the ids."""
    rows = [{"text": f"text {i}", "label": label, "language": "en"} for i, label in enumerate(labels)]
    train = load_data(write(folder / f"train{suffix}", rows), **options)["train"]
    return train.features["label"].names, list(train["label"])


def load_column(folder: Path, column: Any, text: Any = None, **options: Any) -> tuple[list[str], list[Any]]:
    text = pa.array([f"text {i}" for i in range(len(column))]) if text is None else text
    pq.write_table(
        pa.table({"text": text, "label": column, "language": ["en"] * len(column)}), folder / "train.parquet"
    )
    train = load_data(folder / "train.parquet", **options)["train"]
    label = train.features["label"]
    return getattr(label, "feature", label).names, list(train["label"])


class TestText:
    @pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
    @pytest.mark.parametrize(
        "labels",
        [
            ["0.0", "1.0", "-1.0", ""],
            ["0", "1", "-1", "  "],
            ["0e0", "1.000000000000000000e+00", "-1", "nan"],
            ["+0", "1.", "<NA>", "None"],
            ["00", " 1 ", "NULL", "N/A"],
        ],
    )
    def test_ids(self, tmp_path: Path, suffix: str, labels: list[str]) -> None:
        assert load(tmp_path, labels, suffix) == (["0", "1"], [0, 1, -1, -1])
        assert load(tmp_path, labels, suffix, label_names=NAMES) == (NAMES, [0, 1, -1, -1])

    @pytest.mark.parametrize(
        ("labels", "names", "ids"),
        [
            (["2.0", "1.5"], ["1.5", "2.0"], [1, 0]),
            (["-1", "1", "0"], ["-1", "0", "1"], [0, 2, 1]),
            (["5.0", "1.0", "-1.0"], ["1", "5"], [1, 0, -1]),
            (["nan", "a"], ["a", "nan"], [1, 0]),
            (["None", "NA", "-1"], ["NA", "None"], [1, 0, -1]),
            (["1", "2"], ["1", "2", "3"], [0, 1]),
            (["0", "1", "2"], ["1", "2", "3"], [0, 1, 2]),
            (["POS", " neg "], NAMES, [1, 0]),
            (["cafe\u0301", "tea"], ["caf\u00e9", "tea"], [0, 1]),
            (["caf\u00e9", "tea"], ["cafe\u0301", "tea"], [0, 1]),
        ],
    )
    def test_names_given(self, tmp_path: Path, labels: list[str], names: list[str], ids: list[int]) -> None:
        for suffix in (".csv", ".jsonl"):
            assert load(tmp_path, labels, suffix, label_names=names) == (names, ids)

    def test_names_found(self, tmp_path: Path) -> None:
        assert load(tmp_path, ["caf\u00e9", "cafe\u0301", " caf\u00e9 "]) == (["caf\u00e9"], [0, 0, 0])
        assert load(tmp_path, ["none", "NA", "-1", "-1.0"]) == (["NA", "none"], [1, 0, -1, -1])
        assert load(tmp_path, ["0", "1", "other"]) == (["0", "1", "other"], [0, 1, 2])

    @pytest.mark.parametrize(
        ("labels", "options", "message"),
        [
            (["a", "nan"], {}, r"\['nan'\] among them; leave a missing label empty, or give label_names"),
            (["a", "<NA>"], {}, r"\['<NA>'\] among them"),
            (["Pos", "pos"], {}, r"a name twice in the labels, 'Pos' and 'pos': case"),
            (["Caf\u00e9", "cafe\u0301"], {}, r"'Caf\\xe9' and 'caf\\xe9'"),
            (["1", "1.0", "x"], {}, r"'1' and '1\.0'"),
            (["0.5", "1.0"], {}, r"numbers, but no ids 0, 1, \.\.\.: \['0\.5'\]; .*label_names"),
            (["1" * 30, "0"], {}, r"no ids 0, 1, "),
            (["1e999", "0"], {}, r"no ids 0, 1, "),
            (["c\u0430t"], {"label_names": ["cat"]}, r"outside the label names: .*'c\\u0430t'.*\['cat'\]"),
            (
                ["a"],
                {"label_names": ["caf\u00e9", "cafe\u0301"]},
                r"twice in label_names, 'caf\\xe9' and 'cafe\\u0301'",
            ),
            (["a"], {"label_names": ["a", "A "]}, r"twice in label_names, 'a' and 'A '"),
            (["1.0", "2.0"], {"label_names": ["1", "2", "3"]}, r"may be ids or names"),
            (["-1", ""], {}, r"no row has a label; give label_names"),
        ],
    )
    def test_unclear(self, tmp_path: Path, labels: list[str], options: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=rf"train\.jsonl: .*{message}"):
            load(tmp_path, labels, **options)

    def test_numbers_that_may_be_ids_or_names(self, tmp_path: Path) -> None:
        stars = ["1", "2", "3"]
        assert load(tmp_path, [1, 5, -1], label_names=["1", "5"]) == (["1", "5"], [0, 1, -1])
        assert load(tmp_path, [0, 1, 2], label_names=stars) == (stars, [0, 1, 2])
        assert load(tmp_path, [1, 2, 3], label_names=stars) == (stars, [0, 1, 2])
        with pytest.raises(UserError, match=r"labels \['1', '2'\] .* may be ids or names"):
            load(tmp_path, [1, 2], label_names=stars)

    def test_one_meaning_for_all_splits(self, tmp_path: Path) -> None:
        write(tmp_path / "train.csv", [{"text": "a", "label": label, "language": "en"} for label in ("0", "1", "x")])
        write(tmp_path / "test.csv", [{"text": "a", "label": label, "language": "en"} for label in ("1", "0")])
        assert list(load_data(tmp_path)["test"]["label"]) == [1, 0]


class TestArrow:
    @pytest.mark.parametrize(
        "column",
        [
            pa.array(np.array([0, 1, np.nan], np.float16)),
            pa.array([0, 1, None], pa.float32()),
            pa.array([0, 1, -1], pa.int8()),
            pa.array([0, 1, None], pa.uint64()),
            pa.array([False, True, None]),
            pa.array([Decimal("0.00"), Decimal("1.00"), None]),
            pa.array([0.0, 1.0, None]).dictionary_encode(),
            pa.array(["0.0", "1.0", None]).dictionary_encode(),
            pa.array(["0", "1", ""], pa.large_string()),
            pa.array(["0", "1", " "]).cast(pa.string_view()),
        ],
        ids=lambda column: str(column.type),
    )
    def test_ids(self, column: pa.Array) -> None:
        from amtss_fast.data.arrow import plain_table
        from amtss_fast.data.labels import label_ids

        column = plain_table(pa.table({"label": column}))["label"].combine_chunks()
        ids, names = label_ids({"train": column}, None, NAMES)
        assert (ids["train"].to_pylist(), names) == ([0, 1, -1], NAMES)

    def test_files(self, tmp_path: Path) -> None:
        texts = pa.array(["x", "y"]).dictionary_encode()
        assert load_column(tmp_path, pa.array([1, 0], pa.uint8()), texts) == (["0", "1"], [1, 0])
        assert load_column(tmp_path, pa.nulls(2), label_names=NAMES) == (NAMES, [-1, -1])

    def test_run_ends_and_views(self) -> None:
        from amtss_fast.data.arrow import plain_table

        runs = pc.run_end_encode(pa.array(["a", "a", None]))
        views = pa.array([["a"], None, []], pa.list_view(pa.string()))
        table = plain_table(pa.table({"a": runs, "b": views}, metadata={"k": "v"}))
        assert table.to_pydict() == {"a": ["a", "a", None], "b": [["a"], None, []]}
        assert [str(kind) for kind in table.schema.types] == ["string", "large_list<item: string>"]
        assert table.schema.metadata == {b"k": b"v"}

    @pytest.mark.parametrize(
        ("labels", "words"),
        [
            (pa.list_(pa.float64(), 2), pa.list_(pa.string(), 2)),
            (pa.large_list(pa.int16()), pa.large_list(pa.large_string())),
            (pa.list_(pa.float32()), pa.list_(pa.dictionary(pa.int8(), pa.string()))),
        ],
        ids=str,
    )
    def test_words(self, tmp_path: Path, labels: pa.DataType, words: pa.DataType) -> None:
        found = load_column(tmp_path, pa.array([[0, 1], [1, None], None], labels), pa.array([["a", "b"]] * 3, words))
        assert found == (["0", "1"], [[0, 1], [1, -1], [-1, -1]])

    @pytest.mark.parametrize(
        ("column", "message"),
        [
            (pa.array([0.0, float("inf")]), r"not ids or names: \['inf'\]"),
            (pa.array([0.0, 1e300]), r"not ids or names"),
            (pa.array([0, 2**63 + 1], pa.uint64()), r"not ids or names: \['9223372036854775809'\]"),
            (pa.array([Decimal("0.5"), None]), r"not ids or names: \['0.5'\]"),
            (pa.array([datetime.date(2020, 1, 1)] * 2), r"labels of split 'train' are date32\[day\], neither"),
            (pa.array([datetime.datetime(2020, 1, 1)] * 2), r"labels of split 'train' are timestamp"),
            (pa.array([b"a", b"b"]), r"labels of split 'train' are binary"),
            (pa.array([{"a": 1}] * 2), r"labels of split 'train' are struct"),
        ],
    )
    def test_refused(self, tmp_path: Path, column: pa.Array, message: str) -> None:
        with pytest.raises(UserError, match=rf"train\.parquet: .*{message}"):
            load_column(tmp_path, column)

    @pytest.mark.parametrize("text", [pa.array([b"x", b"y"]), pa.array([1.0, 2.0]), pa.array([True, False])])
    def test_no_texts(self, tmp_path: Path, text: pa.Array) -> None:
        with pytest.raises(UserError, match=r"train\.parquet: column 'text' holds .*, not text"):
            load_column(tmp_path, pa.array([0, 1]), text)

    def test_translations_that_are_no_texts(self, tmp_path: Path) -> None:
        path = write(tmp_path / "x.jsonl", [{"text": {"en": 3, "sw": 4}, "label": 0}])
        with pytest.raises(UserError, match=r"x\.jsonl: column 'text' holds int64 in 'en', not text"):
            load_data(path)


class TestByName:
    def own(self, names: list[str], ids: list[int]) -> Dataset:
        features = Features({"text": Value("string"), "label": ClassLabel(names=names), "language": Value("string")})
        return Dataset.from_dict({"text": ["a"] * len(ids), "label": ids, "language": ["en"] * len(ids)}, features)

    def test_own_names_among_those_given(self, tmp_path: Path) -> None:
        self.own(["pos", "Neg"], [0, 1, -1]).to_parquet(tmp_path / "train.parquet")
        train = load_data(tmp_path, label_names=["neg", "neu", "pos"])["train"]
        assert train.features["label"].names == ["neg", "neu", "pos"]
        assert list(train["label"]) == [2, 0, -1]
        with pytest.raises(UserError, match=r"label_names=\['neg', 'neu'\] differ .*\['pos', 'Neg'\]"):
            load_data(tmp_path, label_names=["neg", "neu"])

    def test_align(self, tmp_path: Path) -> None:
        data = DatasetDict(train=self.own(["pos", "neg"], [0, 1, -1]))
        aligned = align_labels(data, ["neg", "neu", "pos"])["train"]
        assert list(aligned["label"]) == [2, 0, -1]
        assert aligned.features["label"].names == ["neg", "neu", "pos"]
        assert align_labels(data, ["pos", "neg"]) is data
        with pytest.raises(UserError, match=r"does not have: \['pos'\]; .*\['pos', 'neg'\].*\['neg', 'neu'\]"):
            align_labels(data, ["neg", "neu"])

    def test_align_words(self, tmp_path: Path) -> None:
        rows = [{"text": ["a", "b"], "label": ["x", "y"], "language": "en"}]
        data = load_data(write(tmp_path / "train.jsonl", rows))
        aligned = align_labels(data, ["y", "z", "x"])["train"]
        assert aligned["label"][:] == [[2, 0]]
        assert aligned.features["label"].feature.names == ["y", "z", "x"]

    def test_languages_in_two_spellings(self, tmp_path: Path) -> None:
        rows = [{"text": "a", "label": 0, "language": code} for code in ("pt_BR", "pt-BR")]
        with pytest.raises(UserError, match=r"one language in two spellings, 'pt_BR' and 'pt-BR'"):
            load_data(write(tmp_path / "x.jsonl", rows))
