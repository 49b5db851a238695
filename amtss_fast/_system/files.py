"""Files that are whole or not there."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
# Bytes that are free where a disk is full: libraries raise errors of their own, and remove what they could not finish.
_FULL = 1 << 20


def write_atomically(file: Path, data: str | bytes, partial: Path | None = None) -> None:
    """Writes all of `data` (text as UTF-8) to the file, or leaves the file as it was.

    Args:
        partial: the name until it is whole, for writers that may meet; default: the file's with `.partial` behind it.
    """
    partial = partial or file.with_name(file.name + ".partial")
    try:
        with names_file(file):
            # What lies there may be a link to another place, and would be followed.
            partial.unlink(missing_ok=True)
            partial.write_bytes(data.encode() if isinstance(data, str) else data)
            publish(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def publish(partial: Path, file: Path) -> None:
    """Gives a finished file its name, after its data has reached the disk."""
    with open(partial, "rb") as stream:
        os.fsync(stream.fileno())
    os.replace(partial, file)


@contextmanager
def names_file(file: Path) -> Iterator[None]:
    """Around code that writes a file or into a folder: an OSError in it names the file, and a full disk is one.

    Raises:
        OSError: for errors of torch and safetensors too, if hardly anything fits on the disk any more.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _OF_DISKS or error.filename is not None:
            raise
        # Arrow has words of its own for it.
        raise OSError(error.errno, os.strerror(error.errno), str(file)) from error
    except Exception as error:
        full = "No space left" in str(error) or ("inline_container" in str(error) and _free(file) < _FULL)
        if not full:
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file)) from error


def _free(file: Path) -> int:
    return shutil.disk_usage(next(place for place in (file, *file.parents) if place.exists())).free
