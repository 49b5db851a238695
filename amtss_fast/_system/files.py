"""Files that are whole or not there."""

import os
from pathlib import Path


def write_atomically(file: Path, data: str | bytes, partial: Path | None = None) -> None:
    """Writes all of `data` (text as UTF-8) to the file, or leaves the file as it was.

    Args:
        partial: the name until it is whole, for writers that may meet; default: the file's with `.partial` behind it.
    """
    partial = partial or file.with_name(file.name + ".partial")
    try:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)
        publish(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def publish(partial: Path, file: Path) -> None:
    """Gives a finished file its name, after its data has reached the disk."""
    with open(partial, "rb") as stream:
        os.fsync(stream.fileno())
    os.replace(partial, file)
