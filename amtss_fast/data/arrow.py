"""Arrow tables and columns: what `load`, `labels` and `splits` share."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features

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


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds strings."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def is_list(kind: pa.DataType) -> bool:
    """Whether a column of this type holds lists."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def blank_to_null(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A text column with null in place of "", which is how a CSV writes a missing value."""
    return pc.if_else(pc.equal(column, ""), None, column)


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
