"""The backends that this machine has."""

from __future__ import annotations

import torch

from amtss_fast.loss import registry


def available_backends() -> list[str]:
    """Their names."""
    return [name for name in registry.BACKENDS if registry.why_missing(name) is None]


def is_interpreted(backend: str) -> bool:
    """Whether its kernels run in Triton's interpreter, where a program takes up to a second: tests use fewer rows."""
    return backend == "triton" and not torch.cuda.is_available()
