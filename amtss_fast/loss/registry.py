"""The choice of the backend that runs a call: the one named by the caller, or the best that can run the tensors."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from amtss_fast.loss.contract import Backend, LossInputs
from amtss_fast.loss.options import LossOptions

# The module of each backend.
BACKENDS = {
    "cpu": "amtss_fast.loss.backends.cpu",
    "triton": "amtss_fast.loss.backends.triton",
    "reference": "amtss_fast.loss.backends.reference",
}
# What `backend=None` tries on each type of device, best first.
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")}


@functools.cache
def find_backend(name: str) -> Backend:
    """The backend of that name; ValueError if there is none."""
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {sorted(BACKENDS)} or None, got {name!r}")
    module: Any = importlib.import_module(BACKENDS[name])
    return module  # type: ignore[no-any-return]


@functools.cache
def why_missing(name: str) -> str | None:
    """Why backend `name` cannot run on this machine; None if it can."""
    return find_backend(name).why_missing()


def check_name(name: str | None) -> None:
    """Raise TypeError or ValueError for what is no name of a backend."""
    if name is not None and not isinstance(name, str):
        raise TypeError(f"backend must be one of {sorted(BACKENDS)} or None, got {name!r}")
    if name is not None and name not in BACKENDS:
        find_backend(name)


def choose_backend(name: str | None, inputs: LossInputs, options: LossOptions) -> Backend:
    """The backend of that name, or without a name the first one of the device that runs this call.

    Raises:
        ValueError: an unknown name.
        RuntimeError: a backend that is missing or cannot run it.
    """
    if name is not None:
        backend = find_backend(name)
        if (reason := why_missing(name)) is not None:
            raise RuntimeError(f"backend {name!r} is not available: {reason}")
        if (reason := backend.why_not(inputs, options)) is not None:
            raise RuntimeError(f"backend {name!r} cannot run these tensors: {reason}")
        return backend
    for preferred in _PREFERENCE.get(inputs.student_logits.device.type, ("reference",)):
        if why_missing(preferred) is None:
            backend = find_backend(preferred)
            if backend.why_not(inputs, options) is None:
                return backend
    raise AssertionError("the reference runs everything")


def best_backend(device: torch.device) -> Backend:
    """The best backend of this machine for tensors on `device`."""
    for name in _PREFERENCE.get(device.type, ("reference",)):
        if why_missing(name) is None:
            return find_backend(name)
    raise AssertionError("the reference runs everywhere")
