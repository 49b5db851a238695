"""Compiled kernels and their launches."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from functools import cache
from operator import itemgetter
from typing import Any, NamedTuple

import torch

import triton
from amtss_fast._compat.triton import direct_launch


class Target(NamedTuple):
    """What kernels are compiled for."""

    backend: str
    """Either "cuda" or "hip"."""
    arch: int | str
    """90 for compute capability 9.0; "gfx942"."""
    warp_size: int
    """Threads."""


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def current_target() -> Target:
    """The target of this machine's GPU."""
    if interpreted():
        return Target("cuda", 90, 32)
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    if torch.version.hip is not None:
        return Target("hip", properties.gcnArchName.split(":")[0], properties.warp_size)
    return Target("cuda", properties.major * 10 + properties.minor, 32)


@cache
def multiprocessors(device: int) -> int:
    """The multiprocessors of a device."""
    # Triton's interpreter runs one program at a time.
    return 1 if device < 0 else torch.cuda.get_device_properties(device).multi_processor_count


class Binary:
    """A kernel that is always launched on one device, with arguments of the same types and the same constants.

    The first launch compiles it. Later launches skip Triton's search for the compiled kernel by the types of all
    arguments, which takes longer than a launch.
    """

    def __init__(self, kernel: Any, threads: int, registers: int | None = None) -> None:
        self.kernel = kernel
        self.threads = threads
        self.registers = registers
        self.names = tuple(inspect.signature(kernel.fn).parameters)
        self._pick = itemgetter(*self.names)
        self._launch: Callable[[tuple[int, int, int]], Callable[..., Any]] | None = None

    def options(self, target: Target) -> dict[str, Any]:
        """The options that it is compiled with."""
        # Fused multiplications and additions would round the student's and the teachers' terms differently. Without
        # them the gradient is exactly 0 where student and teacher are equal.
        options = {"num_warps": max(1, self.threads // target.warp_size), "enable_fp_fusion": False}
        if self.registers is None or target.backend != "cuda":
            return options
        # The assembler for Blackwell needs more registers for the same code without spilling.
        blackwell = isinstance(target.arch, int) and target.arch >= 100
        return options | {"maxnreg": min(255, self.registers * 3 // 2) if blackwell else self.registers}

    def launch(self, programs: int, values: Sequence[Any]) -> None:
        """Launches on the current device; `values`: all arguments of the kernel, in order."""
        if self._launch is not None:
            self._launch((programs, 1, 1))(*values)
            return
        compiled = self.kernel[(programs,)](*values, **self.options(current_target()))
        if not interpreted():
            self._launch = direct_launch(compiled)

    def of(self, programs: int, arguments: dict[str, Any]) -> Launch:
        """A launch with those of `arguments` that the kernel takes."""
        return Launch(self, programs, self._pick(arguments))


class Launch(NamedTuple):
    """One kernel with its arguments, in order."""

    binary: Binary
    programs: int
    values: tuple[Any, ...]

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments by name."""
        return dict(zip(self.binary.names, self.values, strict=True))


def launch_all(launches: Sequence[Launch]) -> None:
    """Launches kernels in order on the current device."""
    if os.environ.get("AMTSS_AUTOTUNE") == "1":
        for launch in launches:
            _tunable(launch.binary.kernel)[(launch.programs,)](**launch.arguments, enable_fp_fusion=False)
        return
    for binary, programs, values in launches:
        binary.launch(programs, values)


@cache
def _tunable(jitted: Any) -> Any:
    """The kernel with an autotuner for its number of warps."""
    configs = [triton.Config({}, num_warps=warps) for warps in (1, 2, 4, 8, 16)]
    names = inspect.signature(jitted.fn).parameters
    return triton.autotune(configs, [name for name in ("n_classes", "n_teachers") if name in names])(jitted)


def binaries(kernel: Any, threads: int) -> Callable[..., Binary]:
    """For a kernel outside of plans: its binary, by the device and whatever else determines its types and constants."""
    return cache(lambda *_: Binary(kernel, threads))
