"""Where the kernels find the teachers' logits, see `device/inputs.py`: in arguments, by one stride, or in a table.

Tables are written by kernels, because a copy from the host would wait and could not be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .binary import Launch, binaries
from .config import KINDS
from .device.inputs import write_entry, write_numbers, write_places

# Teachers whose addresses are arguments of a kernel; of these a quarter or a half is given where that is enough.
SLOTS = 16
# The numbers of the types of logits in a kernel.
KIND_NUMBERS = {dtype: number for number, dtype in enumerate(KINDS)}

_SLOT_NAMES = [f"t{k}" for k in range(SLOTS)]
_write_entry = binaries(write_entry, 32)
_write_numbers = binaries(write_numbers, 32)
_write_places = binaries(write_places, 128)
# Numbers of a launch of `write_numbers`, and rows of a program of `write_places`.
_NUMBERS, _ROWS = 8, 1024


def teacher_arguments(teachers: Sequence[Tensor]) -> tuple[dict[str, Any], list[Launch]]:
    """The arguments that locate the teachers, and the launches that write the table if there is one."""
    n_teachers, first = len(teachers), teachers[0]
    n_slots = next((n for n in (SLOTS // 4, SLOTS // 2) if n_teachers <= n), SLOTS)
    slots: list[Tensor | None] = list(teachers[:SLOTS])
    slots += slots[-1:] * (n_slots - len(slots)) + [None] * (SLOTS - n_slots)
    arguments: dict[str, Any] = dict(zip(_SLOT_NAMES, slots, strict=True))
    strides = [t.stride() for t in teachers]
    uniform = strides.count(strides[0]) == n_teachers
    stack, table, launches = 0, None, []
    if uniform and n_teachers > SLOTS and (step := _stack_stride(teachers)):
        stack = SLOTS * step * first.element_size()
    elif n_teachers > SLOTS or not uniform:
        table = first.new_empty((n_teachers, 4), dtype=torch.int64)
        binary = _write_entry(first.get_device())
        for k, t in enumerate(teachers):
            beyond = t.data_ptr() - teachers[k % SLOTS].data_ptr()
            launches.append(Launch(binary, 1, (table, k, beyond, *t.stride(), KIND_NUMBERS[t.dtype])))
    arguments["teacher_stack"] = stack
    arguments["teacher_table"] = table
    return arguments, launches


def numbers(values: Sequence[float], like: Tensor, launches: list[Launch]) -> Tensor:
    """`values` in float32 on the device of `like`."""
    out = like.new_empty(len(values), dtype=torch.float32)
    for first in range(0, len(values), _NUMBERS):
        some = values[first : first + _NUMBERS]
        padded = (*some, *[0.0] * (_NUMBERS - len(some)))
        launches.append(Launch(_write_numbers(like.get_device()), 1, (out[first:], len(some), *padded)))
    return out


def places(teacher_rows: Sequence[Tensor | None], n_rows: int, like: Tensor, launches: list[Launch]) -> Tensor | None:
    """Where each row is among those of each teacher, [K, N], -1 where it is not; None if all have all rows."""
    if all(rows is None for rows in teacher_rows):
        return None
    out = like.new_full((len(teacher_rows), n_rows), -1, dtype=torch.int32)
    for own, rows in zip(out, teacher_rows, strict=True):
        n_own = n_rows if rows is None else len(rows)
        if n_own > 0:
            binary = _write_places(like.get_device(), rows is None)
            given = None if rows is None else rows.contiguous()
            launches.append(Launch(binary, -(-n_own // _ROWS), (given, own, n_rows, n_own, _ROWS)))
    return out


def _stack_stride(teachers: Sequence[Tensor]) -> int | None:
    """Elements from one teacher to the next if they are the layers of one tensor; otherwise None."""
    first, second = teachers[0], teachers[1]
    step = int(second.storage_offset()) - int(first.storage_offset())
    for k, t in enumerate(teachers):
        if t.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() or t.dtype != first.dtype:
            return None
        if t.storage_offset() != first.storage_offset() + k * step:
            return None
    return step if step > 0 else None
