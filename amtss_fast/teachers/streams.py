"""Forward passes of teachers beside the student: one stream per device for the teachers on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

_T = TypeVar("_T")


class Streams:
    """The streams of a pool's teachers, made at first use."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}

    def of(self, device: torch.device) -> Any:
        """The teachers' stream on a device; not the one that the student works in."""
        if device not in self._streams:
            self._streams[device] = torch.get_device_module(device).Stream(device)
        return self._streams[device]

    def start(
        self, order: Iterable[int], device_of: Callable[[int], torch.device], work: Callable[[int], _T]
    ) -> tuple[dict[int, _T], Callable[[], None]]:
        """Runs `work(k)` for each teacher in `order`, in the stream of its device.

        Args:
            order: numbers of teachers.
            device_of: the device of teacher k, asked when its turn has come.
            work: what it does. Tensors that it reads must live until the returned function was called.

        Returns:
            The results by number, and a function that makes the current stream of each device wait for them.
        """
        results = {}
        used = set()
        for k in order:
            device = device_of(k)
            stream, module = self.of(device), torch.get_device_module(device)
            if device not in used:
                stream.wait_stream(module.current_stream(device))
                used.add(device)
            with module.stream(stream):
                results[k] = work(k)

        def wait() -> None:
            for device in used:
                torch.get_device_module(device).current_stream(device).wait_stream(self.of(device))

        return results, wait
