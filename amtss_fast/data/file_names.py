"""What the name of a local file says: its split and its language."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from amtss_fast.errors import UserError
from amtss_fast.models.names import normalize_language

_SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
# `train_data` and `test-set` name a split, `test_drive` does not.
_PLAIN_WORDS = ("data", "dataset", "set", "split")
_EMBEDDED = Path(__file__).parent / "embedded" / "languages.txt"
# Language, script, region: `pt`, `pt-BR`, `eng_Latn`, `es-419`. Capitals as they are usual: `to_do` is no code.
_CODE = re.compile(r"([a-z]{2,3})(?:[-_][A-Z][a-z]{3})?(?:[-_](?:[A-Z]{2}|001|150|419))?")
# Numbers of a shard, `-00000-of-00002`, or of a year at the end. Three digits behind a code may be a region.
_SHARD = r"[\W_]+[0-9]+[\W_]+of[\W_]+[0-9]+"
_NUMBER = re.compile(rf"(?:{_SHARD}|[\W_]+(?![0-9]{{3}}$)[0-9]+)$")
_ANY_NUMBER = re.compile(rf"(?:{_SHARD}|[\W_]+[0-9]+)$")
_SPLIT = rf"(?<![^\W_])(?P<split>{'|'.join(_SPLITS)})[0-9]*(?![^\W_])"
_BESIDE = rf"(?:{_SHARD}|[\W_]+(?:[0-9]+|{'|'.join(_PLAIN_WORDS)})(?![^\W_]))*"
_SPLIT_WORD = re.compile(_SPLIT + _BESIDE, re.IGNORECASE)
_FIRST_SPLIT = re.compile(rf"^{_SPLIT}{_BESIDE}(?:[\W_]+|$)", re.IGNORECASE)
_LAST_SPLIT = re.compile(rf"(?:^|[\W_]+){_SPLIT}{_BESIDE}$", re.IGNORECASE)


@cache
def known_languages() -> frozenset[str]:
    """The codes of ISO 639-1 and 639-3, without those that are usual words in names of files (`new`, `raw`, `set`)."""
    return frozenset(_EMBEDDED.read_text("ascii").split())


def same_code(code: str) -> str:
    """A language code as it is compared with the codes in names of files: `_` and `-` are alike."""
    return unicodedata.normalize("NFC", code).replace("_", "-")


def one_spelling(codes: Iterable[str], where: str) -> None:
    """Raises UserError for two spellings of one language code, which would be two languages."""
    spelled: dict[str, str] = {}
    for code in codes:
        other = spelled.setdefault(normalize_language(code), code)
        if other != code:
            raise UserError(f"{where} have one language in two spellings, {other!a} and {code!a}; use one")


@dataclass(frozen=True)
class FileName:
    """The name of a file below a folder, piece by piece: the file first, then its folders, the nearest first."""

    file: Path
    root: Path

    def split(self, languages: Sequence[str] | None = None) -> str | None:
        """The split that the file's name gives, or else the nearest folder's.

        A piece names a split if the split's word ends it (`my-train`), or if a language code alone, known or one of
        `languages`, stands behind it (`train.pt-BR`). Numbers of shards and words like `data` do not count.

        Raises:
            UserError: a piece that names two.
        """
        given = {same_code(code) for code in languages or ()}
        for piece in self._pieces():
            words = list(_SPLIT_WORD.finditer(piece))
            named = []
            for word in words:
                rest = piece[word.end() :].lstrip("-_. ")
                if not rest or any(same_code(name) in given or _is_code(name) for name in _shorter(rest, _ANY_NUMBER)):
                    named.append(word)
            if named and words[0].start() == 0:
                named.append(words[0])
            found = {_SPLITS[word["split"].lower()] for word in named}
            if len(found) > 1:
                raise UserError(f"{self.file} names several splits: {sorted(found)}")
            if found:
                return found.pop()
        return None

    def split_word(self) -> str | None:
        """A split's word anywhere in the file's name."""
        word = _SPLIT_WORD.search(next(self._pieces()))
        return None if word is None else word["split"]

    def language(self, languages: Sequence[str] | None) -> str | None:
        """The language that the file's name gives, or else the nearest folder's.

        It is one of `languages`, as it stands there, or else a piece that is a known code beside a split and numbers of
        shards.
        """
        given = {same_code(code): code for code in languages or ()}
        for piece in self._pieces():
            bare = _LAST_SPLIT.sub("", _FIRST_SPLIT.sub("", piece))
            for name in (piece, *_shorter(bare, _ANY_NUMBER)):
                if same_code(name) in given:
                    return given[same_code(name)]
            for name in _shorter(bare, _NUMBER):
                # `my_train` is rather somebody's than Burmese.
                if _is_code(name) and not (name == "my" and name != piece):
                    return name
        return None

    def _pieces(self) -> Iterator[str]:
        name = self.file.name if self.file.is_dir() else self.file.stem
        folders = self.file.relative_to(self.root).parts[:-1]
        return (unicodedata.normalize("NFC", piece) for piece in (name, *reversed(folders)))


def _shorter(name: str, number: re.Pattern[str]) -> Iterator[str]:
    """The name, and the name without numbers at its end, one number less each time."""
    while True:
        yield name
        shorter = number.sub("", name)
        if shorter == name:
            return
        name = shorter


def _is_code(name: str) -> bool:
    match = _CODE.fullmatch(name)
    return match is not None and match[1] in known_languages()
