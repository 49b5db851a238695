"""Arrow tables and columns: what `load`, `labels` and `splits` share."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features

from amtss_fast.loss.options import UNLABELED_INDEX

# Offsets of an Arrow string array are 32 bits: a chunk of this many rows stays far below 2 GiB.
_CHUNK_ROWS = 100_000


def table_of(dataset: Dataset) -> pa.Table:
    """All rows of a data set as one Arrow table."""
    return dataset.with_format("arrow")[:]


def dataset_of(table: pa.Table, features: Features, split: Any) -> Dataset:
    """A data set in memory. Its chunks always have the same size, so its fingerprint depends on the content alone."""
    table = table.select(list(features)).combine_chunks()
    batches = [batch.cast(features.arrow_schema) for batch in table.to_batches(max_chunksize=_CHUNK_ROWS)]
    # A column without nulls may have a null mask or none, which changes the fingerprint; Arrow's IPC format drops it.
    batches = [pa.ipc.read_record_batch(batch.serialize(), features.arrow_schema) for batch in batches]
    table = pa.Table.from_batches(batches, schema=features.arrow_schema)
    info = datasets.DatasetInfo(features=features)
    return Dataset(table, info=info, split=datasets.NamedSplit(str(split)) if split else None)


def plain_table(table: pa.Table) -> pa.Table:
    """The table with one Arrow type for each kind of value: no dictionaries, run ends, views or lists of one size."""
    for i, field in enumerate(table.schema):
        column, kind = table.column(i), plain_type(field.type)
        if pa.types.is_run_end_encoded(column.type):
            column = pa.chunked_array([pc.run_end_decode(chunk) for chunk in column.chunks], column.type.value_type)
        if column.type != kind:
            column = column.cast(kind)
        if field.type != kind:
            table = table.set_column(i, pa.field(field.name, kind, metadata=field.metadata), column)
    return table


def plain_type(kind: pa.DataType) -> pa.DataType:
    """See :func:`plain_table`."""
    types = pa.types
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return plain_type(kind.value_type)
    if types.is_string_view(kind):
        return pa.large_string()
    if types.is_list(kind):
        return kind if plain_type(kind.value_type) == kind.value_type else pa.list_(plain_type(kind.value_type))
    if is_list(kind) or types.is_fixed_size_list(kind) or types.is_list_view(kind) or types.is_large_list_view(kind):
        return pa.large_list(plain_type(kind.value_type))
    if types.is_struct(kind):
        return pa.struct([field.with_type(plain_type(field.type)) for field in kind])
    return kind


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds strings."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def is_list(kind: pa.DataType) -> bool:
    """Whether a column of this type holds lists."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def blank_to_null(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A text column with null in place of blanks alone, which is how a CSV writes a missing value."""
    return pc.if_else(pc.equal(pc.utf8_trim_whitespace(column), ""), None, column)


def has_label(labels: pa.Array) -> np.ndarray:
    """[N] bool: whether a row has a label, or a label of any of its words."""
    values = labels
    if is_list(labels.type):
        lengths = pc.list_value_length(labels).to_numpy()
        values = pa.array(np.maximum.reduceat(pc.list_flatten(labels).to_numpy(), np.cumsum(lengths) - lengths))
    known: np.ndarray = values.to_numpy() != UNLABELED_INDEX
    return known


def in_lists(values: pa.Array, like: pa.Array) -> pa.Array:
    """The values in lists of the same lengths as those of `like`."""
    ends = np.cumsum(pc.list_value_length(like).to_numpy())
    return pa.LargeListArray.from_arrays(pa.array(np.concatenate([[0], ends])), values)


def count_values(column: pa.ChunkedArray) -> dict[str, int]:
    """How often each value occurs, in the order of their first rows."""
    return {item["values"]: item["counts"] for item in column.value_counts().to_pylist()}


def value_codes(column: pa.ChunkedArray) -> np.ndarray:
    """[N] integers, one for each distinct value (null is one too), in the order of their first rows."""
    encoded = column.combine_chunks().dictionary_encode(null_encoding="encode")
    codes: np.ndarray = encoded.indices.to_numpy()
    return codes
