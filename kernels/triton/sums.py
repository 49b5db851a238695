"""The launches that count the rows and add up their losses, see `device/total.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from .binary import Launch, binaries
from .device.total import PARTS, add_rows, count_rows

# Up to here, one program adds up the losses: a second launch would take as long as the first.
ONE_PROGRAM = 65536
# Up to here, each program that needs the number of rows counts the labels itself.
FEW_ROWS = 512

# Rows that a program loads at once, of labels and of losses.
_COUNTED, _ADDED = 1024, 16384
_count_rows = binaries(count_rows, 256)
_add_rows = binaries(add_rows, 1024)


def count(labels: Tensor, ignore_index: int, launches: list[Launch]) -> Tensor:
    """The number of rows that count, in the form that `device/total.py: read_divisor` takes.

    It stays on the device: reading it on the host would wait for the device.
    """
    n_rows = labels.shape[0]
    if n_rows <= FEW_ROWS:
        return labels
    parts = labels.new_empty(PARTS.value, dtype=torch.int32)
    values = (labels, parts, n_rows, ignore_index, _COUNTED)
    launches.append(Launch(_count_rows(labels.get_device()), PARTS.value, values))
    return parts


def add(row_loss: Tensor, divisor: Tensor | None, ignore_index: int, launches: list[Launch]) -> Tensor:
    """The sum of `row_loss`, divided by `divisor` if it is given."""
    device, n_rows = row_loss.get_device(), row_loss.shape[0]
    if n_rows > ONE_PROGRAM:
        parts = row_loss.new_empty(PARTS.value)
        binary = _add_rows(device, None)
        launches.append(Launch(binary, PARTS.value, (row_loss, parts, None, n_rows, ignore_index, _ADDED)))
        row_loss, n_rows = parts, PARTS.value
    loss = row_loss.new_empty(())
    binary = _add_rows(device, None if divisor is None else divisor.dtype)
    launches.append(Launch(binary, 1, (row_loss, loss, divisor, n_rows, ignore_index, _ADDED)))
    return loss
