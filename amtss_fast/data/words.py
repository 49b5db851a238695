"""Columns of lists of words, each word with a label: token classification."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from amtss_fast.data.arrow import in_lists, is_text
from amtss_fast.errors import UserError


def checked_words(column: pa.ChunkedArray, name: str, origin: str) -> pa.Array:
    """Lists of words as one array. Raises UserError for a row without words and for an empty word."""
    kind = column.type.value_type
    if not is_text(kind):
        raise UserError(f"{origin}: column {name!r} holds lists of {kind}, not of words")
    words = column.combine_chunks().cast(pa.large_list(pa.large_string()))
    wrong = pc.list_value_length(words).fill_null(0).to_numpy() == 0
    wrong[pc.list_parent_indices(words).filter(pc.list_flatten(words).is_null())] = True
    if wrong.any():
        raise UserError(f"{origin}: column {name!r} has no word, or an empty one, in row {np.argmax(wrong)}")
    return words


def checked_word_labels(column: pa.ChunkedArray, words: pa.Array, name: str, origin: str) -> pa.Array:
    """A label, or null, for each word; a row without a list of labels gets nulls.

    Raises UserError for a row whose numbers of words and labels differ.
    """
    labels = column.combine_chunks()
    lengths = pc.list_value_length(words).to_numpy()
    labeled = labels.is_valid().to_numpy(zero_copy_only=False)
    found = pc.list_value_length(labels).fill_null(0).to_numpy()
    wrong = labeled & (found != lengths)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise UserError(f"{origin}: row {row} has {lengths[row]} words and {found[row]} labels in column {name!r}")
    # The place of each word's label among the labels of the labeled rows.
    has_label = np.repeat(labeled, lengths)
    place = np.cumsum(has_label) - 1
    flat = pc.list_flatten(labels).take(pa.array(place, mask=~has_label))
    return in_lists(flat, words)
