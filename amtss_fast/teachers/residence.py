"""Teachers that take turns on a device: at most R of K models lie there, the others in the CPU's pinned memory.

The device has R slots of the size of the largest model, so nothing is allocated during training. Weights are frozen:
moving a model in is one copy, moving it out needs none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from amtss_fast.errors import UserError

# Bytes; CUDA aligns its allocations to this.
_ALIGNMENT = 256


class Residence:
    """At most `resident` of the models on the device at a time.

    Each turn belongs to one model. Copies run in a stream of their own as soon as a slot is free: with two slots or
    more the next model is copied while the present one runs, with one slot it is copied between two turns. Models on
    the device have the first turns, so that a round of all K costs K - `resident` copies.

    Args:
        models: frozen, on the CPU, of ordinary dense tensors. Their parameters and buffers are moved to pinned memory.
        names: their names in messages.
        device: where they run.
        resident: R, 1 to K - 1.
        stream: the stream that they run in.

    Raises:
        UserError: `resident` outside its range; weights that are no ordinary tensors, as in 8 bits.
    """

    def __init__(
        self, models: Sequence[nn.Module], names: Sequence[str], device: torch.device, resident: int, stream: Any
    ) -> None:
        if not 1 <= resident < len(models):
            raise UserError(f"resident must be 1 to {len(models) - 1} with {len(models)} teachers, got {resident}")
        self._module = torch.get_device_module(device)
        self._stream = stream
        self._copies = self._module.Stream(device)
        self._tensors = [[*model.parameters(), *model.buffers()] for model in models]
        for name, tensors in zip(names, self._tensors, strict=True):
            if not all(
                type(t) in (Tensor, nn.Parameter) and t.layout is torch.strided and t.dtype != torch.int8
                for t in tensors
            ):
                raise UserError(
                    f"teacher {name!r} has weights in a form of their own, as in 8 bits: teachers that take turns "
                    "(resident) are in float32 or bfloat16"
                )
        self._host = [_packed(tensors, pin=device.type != "cpu") for tensors in self._tensors]
        size = max(len(host) for host in self._host)
        self._slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(resident)]
        # Work that was enqueued before may still use the memory of the slots.
        self._copies.wait_stream(self._module.current_stream(device))
        self._holds: list[int | None] = [None] * resident
        self._arrived = [self._module.Event() for _ in range(resident)]
        self._left = [self._module.Event() for _ in range(resident)]

    def turns(self, wanted: Sequence[int]) -> Iterator[int]:
        """Yields each model of `wanted` once, those on the device first.

        Until the next one is asked for, its weights are on the device for work that is enqueued in `stream`.
        """
        order = sorted(wanted, key=lambda k: k not in self._holds)
        for place, k in enumerate(order):
            due = order[place : place + len(self._slots)]
            for other in due:
                if other not in self._holds:
                    self._bring(other, next(i for i, held in enumerate(self._holds) if held not in due))
            slot = self._holds.index(k)
            self._stream.wait_event(self._arrived[slot])
            try:
                yield k
            finally:
                self._left[slot].record(self._stream)

    def _bring(self, k: int, slot: int) -> None:
        leaving = self._holds[slot]
        if leaving is not None:
            _lay(self._tensors[leaving], self._host[leaving])
        # An event that was never recorded makes nothing wait: the slot has not been used yet.
        self._copies.wait_event(self._left[slot])
        with self._module.stream(self._copies):
            self._slots[slot][: len(self._host[k])].copy_(self._host[k], non_blocking=True)
            self._arrived[slot].record(self._copies)
        _lay(self._tensors[k], self._slots[slot])
        self._holds[slot] = k


def _packed(tensors: Sequence[Tensor], pin: bool) -> Tensor:
    """Moves the tensors into one block of bytes [size] uint8 on the CPU."""
    size = sum(_space(tensor) for tensor in tensors)
    block = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
    for tensor, place in zip(tensors, _places(tensors, block), strict=True):
        place.copy_(tensor)
        tensor.data = place
    return block


def _lay(tensors: Sequence[Tensor], block: Tensor) -> None:
    """Makes the tensors views of a block's contents."""
    for tensor, place in zip(tensors, _places(tensors, block), strict=True):
        tensor.data = place


def _places(tensors: Sequence[Tensor], block: Tensor) -> Iterator[Tensor]:
    start = 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        yield block[start : start + size].view(tensor.dtype).view(tensor.shape)
        start += _space(tensor)


def _space(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
