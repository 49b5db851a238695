"""Tables of any source with the standard columns: text, text_pair, label, language."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from amtss_fast.data.arrow import is_list, is_text
from amtss_fast.data.languages import check_codes, language_column
from amtss_fast.data.sources import Part
from amtss_fast.data.translations import split_translations
from amtss_fast.data.words import checked_word_labels, checked_words
from amtss_fast.errors import UserError


@dataclass(frozen=True)
class Columns:
    """The columns of the source that the caller names; see `amtss_fast.data.load_data`."""

    text: str | None
    text_pair: str | None
    label: str | None
    language: str | None
    language_default: str | None
    extra: tuple[str, ...]

    def texts(self, table: pa.Table, origin: str) -> dict[str, str]:
        """{"text": its column, "text_pair": its column}, the second only if there is one.

        The columns are those that the caller names, else `text`, or XNLI's two where the table has no `text`.

        Raises:
            UserError: the table lacks one of these columns, or one of the label or of `extra`.
        """
        text, pair = "text" if self.text is None else self.text, self.text_pair
        names = set(table.column_names)
        if self.text is None and "text" not in names and {"premise", "hypothesis"} <= names:
            text, pair = "premise", pair or "hypothesis"
        for argument, name in (
            ("text", text),
            ("text_pair", pair),
            ("label", self.label),
            *(("keep", name) for name in self.extra),
        ):
            if name is not None and name not in names:
                raise UserError(
                    f"{origin} has no column {name!r} (argument {argument}); its columns are {table.column_names}"
                )
        return {"text": text} if pair is None else {"text": text, "text_pair": pair}


def standard_table(parts: Sequence[Part], chosen: Columns) -> pa.Table:
    """The parts of one split as one table with the standard columns; `label` still holds what was found.

    Raises:
        UserError: a missing column, a column of a wrong type, empty values, or parts that do not fit together.
    """
    tables: list[pa.Table] = []
    kinds: dict[str, str] = {}
    for part in parts:
        table, kind = _standard_part(part, chosen)
        tables.append(table)
        kinds.setdefault(kind, part.origin)
    if len(kinds) > 1:
        shown = "; ".join(f"{kind}: {origin}" for kind, origin in kinds.items())
        raise UserError(f"the tables of one split differ in kind ({shown}); read them one by one")
    try:
        return pa.concat_tables(tables, promote_options="permissive").combine_chunks()
    except pa.ArrowException as error:
        raise UserError(
            f"the tables of one split do not fit together: {error}; they are {[part.origin for part in parts]}"
        ) from error


def _standard_part(part: Part, chosen: Columns) -> tuple[pa.Table, str]:
    """The rows of a part in the standard columns, and a description of what a row is."""
    table, origin = part.table, part.origin
    sources = chosen.texts(table, origin)
    if _are_translations(table, sources, origin):
        kind = "one row per text in all languages"
        rows, columns = split_translations(table, sources, origin)
    else:
        kind = "one row per text"
        rows = pa.array(np.arange(table.num_rows))
        columns = {name: table[source] for name, source in sources.items()}
        columns["language"] = language_column(part, chosen.language, chosen.language_default)
    if "text_pair" not in sources and is_list(columns["text"].type):
        kind = "one row per list of words"
        columns["text"] = checked_words(columns["text"], sources["text"], origin)
    else:
        columns |= {name: _checked_texts(columns[name], source, origin) for name, source in sources.items()}
    columns["language"] = _checked_texts(columns["language"], chosen.language, origin)
    check_codes(columns["language"], origin)
    columns["label"] = _label_column(table, rows, chosen.label, columns["text"], sources["text"], origin)
    for name in chosen.extra:
        if name in columns:
            raise UserError(f"keep={name!r} would replace the standard column of this name")
        columns[name] = table[name].take(rows)
    return pa.table(columns), f"{kind}, columns {sorted(sources)}"


def _label_column(
    table: pa.Table, rows: pa.Array, label: str | None, texts: pa.Array, text: str, origin: str
) -> pa.ChunkedArray | pa.Array:
    """The labels of these rows as found, null without a label column; lists of labels for lists of words."""
    if label is None:
        return pa.nulls(len(rows), pa.int64())
    labels = table[label].take(rows)
    words = is_list(texts.type)
    if is_list(labels.type) != words:
        shown = f"{label!r} holds {labels.type}, column {text!r} {table[text].type}"
        raise UserError(f"{origin}: column {shown}: either both hold lists, of words and of their labels, or none")
    return checked_word_labels(labels, texts, label, origin) if words else labels


def _are_translations(table: pa.Table, sources: Mapping[str, str], origin: str) -> bool:
    translated = [pa.types.is_struct(table[source].type) for source in sources.values()]
    if any(translated) and not all(translated):
        raise UserError(
            f"{origin}: of the columns {list(sources.values())} only one holds translations; both or none must"
        )
    return all(translated)


def _checked_texts(column: pa.ChunkedArray, source: str | None, origin: str) -> pa.ChunkedArray:
    if not is_text(column.type):
        raise UserError(f"{origin}: column {source!r} holds {column.type}, not text")
    if column.null_count:
        first = pc.index(column.is_null(), True).as_py()
        raise UserError(f"{origin}: column {source!r} has {column.null_count} empty values, the first in row {first}")
    return column.cast(pa.large_string())
