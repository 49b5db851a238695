"""One file of cached logits as mapped arrays. Its checksum may be right and its content anything."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pyarrow as pa

from amtss_fast.errors import UserError


def map_shard(file: Path, schema: pa.Schema) -> pa.RecordBatch:
    """A shard's columns, mapped; a file with a right checksum may be anything.

    Raises:
        UserError: it is not one uncompressed batch of this schema without missing values.
    """
    try:
        messages = pa.ipc.MessageReader.open_stream(pa.memory_map(str(file)))
        message = messages.read_next_message()
        # Arrow ends the process where it reads a schema in a message of another type.
        if message.type != "schema":
            raise ValueError(f"it begins with a {message.type}")
        found = pa.ipc.read_schema(message)
        if not found.equals(schema):
            raise ValueError(f"its columns are {found.remove_metadata()}, not {schema.remove_metadata()}")
        message = messages.read_next_message()
        if message.type != "record batch" or _is_compressed(message.metadata):
            raise ValueError("it is not one batch of uncompressed rows")
        batch = pa.ipc.read_record_batch(message, schema)
        # Arrow itself does not compare the lengths that a file declares with its bytes.
        batch.validate(full=True)
        missing = [name for name in batch.schema.names if _nulls(batch.column(name))]
        if missing:
            raise ValueError(f"values of {missing} are missing")
    except (pa.ArrowException, StopIteration, OSError, ValueError, struct.error) as error:
        raise UserError(f"{file} holds no logits of this cache: {' '.join(str(error).split())}") from error
    return batch


def column_array(column: pa.Array, classes: int) -> np.ndarray:
    """A column of a shard as a view of the mapped file: [n], or [n, C]."""
    lists = pa.types.is_fixed_size_list(column.type)
    array: np.ndarray = (column.flatten() if lists else column).to_numpy(zero_copy_only=True)
    return array.reshape(-1, classes) if lists else array


def _is_compressed(metadata: pa.Buffer) -> bool:
    """Whether the buffers of a batch are compressed: Arrow would unpack any number of bytes from a few.

    Arrow has checked the form of the flatbuffer, but tells only its type: a Message, whose field 2 is the RecordBatch,
    whose field 3 is the compression.
    """
    data = memoryview(metadata)

    def field(table: int, number: int) -> int:
        names = table - struct.unpack_from("<i", data, table)[0]
        place = 4 + 2 * number
        offset = (
            struct.unpack_from("<H", data, names + place)[0] if place < struct.unpack_from("<H", data, names)[0] else 0
        )
        return table + offset if offset else 0

    def follow(place: int) -> int:
        return int(place + struct.unpack_from("<I", data, place)[0])

    return field(follow(field(follow(0), 2)), 3) != 0


def _nulls(column: pa.Array) -> int:
    return int(column.null_count + (column.flatten().null_count if pa.types.is_fixed_size_list(column.type) else 0))
