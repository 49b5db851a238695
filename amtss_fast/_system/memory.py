"""How much memory a process or a device uses, measured and handed back."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from amtss_fast.loss.backends import cpu


def available(device: torch.device) -> int:
    """Bytes that are free: on the machine or in its container, or on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    # A container may have less than the machine.
    limit, usage = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(usage.read_text()))
    return free


def used(device: torch.device) -> int:
    """Bytes in use now: of the process, or of a device's allocator."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def forget_peak(device: torch.device) -> None:
    """Resets the peak that :func:`peak` returns.

    Raises:
        RuntimeError: on a CPU without Linux, which alone can forget an earlier peak.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    if not sys.platform.startswith("linux"):
        raise RuntimeError(f"memory.budget on a CPU needs Linux, this is {sys.platform}")
    give_back()
    Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """The most bytes in use since :func:`forget_peak`, what was there before included."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def peak_of(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes in use while `run` runs, what was there before included; raises as :func:`forget_peak`."""
    forget_peak(device)
    run()
    return peak(device)


def give_back() -> None:
    """Returns unused memory to the system, where the C library can."""
    gc.collect()
    cpu.release_memory()
    if sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
