"""Languages and splits in names of files count only if they are clear."""

from __future__ import annotations

from pathlib import Path

import pytest
from tables import write

from amtss_fast.data import load_data
from amtss_fast.data.file_names import FileName, known_languages
from amtss_fast.errors import UserError

ROWS = [{"text": "x", "label": "a"}, {"text": "y", "label": "b"}]


def name(path: str) -> FileName:
    return FileName(Path("/root") / f"{path}.csv", Path("/root"))


@pytest.mark.parametrize(
    ("path", "split", "language"),
    [
        ("en", None, "en"),
        ("es-419", None, "es-419"),
        ("pt_BR", None, "pt_BR"),
        ("eng_Latn", None, "eng_Latn"),
        ("zh-Hant-TW", None, "zh-Hant-TW"),
        ("hau", None, "hau"),
        ("train.pt-BR", "train", "pt-BR"),
        ("de_train", "train", "de"),
        ("dev2.sw", "validation", "sw"),
        ("Train-en", "train", "en"),
        ("en-00000-of-00002", None, "en"),
        ("train.es-419-00000-of-00001", "train", "es-419"),
        ("test-00000-of-00001", "test", None),
        ("en_2020", None, "en"),
        ("pt_BR/train", "train", "pt_BR"),
        ("test/en", "test", "en"),
        ("en_test/part-1", "test", "en"),
        ("reviews.train.de", "train", None),
        ("my-reviews-test", "test", None),
        ("train_data", "train", None),
        ("test-set", "test", None),
        # Titles.
        ("my_data", None, None),
        ("my_train", "train", None),
        ("ag_news", None, None),
        ("to_do", None, None),
        ("qa_set", None, None),
        ("en-de", None, None),
        ("pt-br", None, None),
        ("EN", None, None),
        ("xx", None, None),
        ("raw/new", None, None),
        ("reviews_en", None, None),
        ("en-002", None, None),
        ("teste\u0301", None, None),
        ("testé", None, None),
        ("test_drive_reviews", None, None),
        ("dev-blog-posts", None, None),
        ("training_camp", None, None),
        ("val_di_fiemme", None, None),
        ("contest", None, None),
        ("train_small", None, None),
    ],
)
def test_names(path: str, split: str | None, language: str | None) -> None:
    assert name(path).split() == split
    assert name(path).language(None) == language


@pytest.mark.parametrize(
    ("path", "languages", "language"),
    [
        ("eng_Latn", ["eng-Latn"], "eng-Latn"),
        ("pt-BR", ["pt_BR"], "pt_BR"),
        ("my", ["my"], "my"),
        ("my_train", ["my"], "my"),
        ("train.x1", ["x1"], "x1"),
        ("en-1", ["en-1", "en"], "en-1"),
        ("en-1", ["en"], "en"),
        ("en-002", ["en"], "en"),
        ("de", ["en"], "de"),
        ("EN", ["en"], None),
        ("new/x", ["new"], "new"),
    ],
)
def test_languages_given(path: str, languages: list[str], language: str | None) -> None:
    assert name(path).language(languages) == language


def test_split_before_a_language_given() -> None:
    assert name("train.x1").split(["x1"]) == "train"
    assert name("train.x1").split() is None


def test_known_languages() -> None:
    assert {"en", "pt", "sw", "fra", "swa", "fin", "cat", "ceb"} <= known_languages()
    assert not {"xx", "new", "raw", "set", "all"} & known_languages()


def test_an_error_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"my_data\.csv has no column 'language'.*language_default.*languages"):
        load_data(write(tmp_path / "my_data.csv", ROWS))


def test_titles_with_the_word_of_a_split(tmp_path: Path) -> None:
    rows = [row | {"language": "en"} for row in ROWS]
    for one in ("test_drive", "train_small"):
        assert list(load_data(write(tmp_path / one / f"{one}.csv", rows))) == ["train"]
    for one in ("train_small", "test_small"):
        write(tmp_path / "both" / f"{one}.csv", rows)
    with pytest.raises(UserError, match=r"test_small\.csv: 'test' in the name may be a split or a part of a title"):
        load_data(tmp_path / "both")
    data = load_data({"train": tmp_path / "both/train_small.csv", "test": tmp_path / "both/test_small.csv"})
    assert list(data) == ["train", "test"]


def test_two_spellings(tmp_path: Path) -> None:
    for path in ("train/pt_BR.csv", "test/pt-BR.csv"):
        write(tmp_path / path, ROWS)
    with pytest.raises(UserError, match=r"names of the files have one language in two spellings, 'pt-BR' and 'pt_BR'"):
        load_data(tmp_path)
    data = load_data(tmp_path, languages=["pt-BR"])
    assert {code for split in data.values() for code in split["language"]} == {"pt-BR"}
