"""Private interfaces of torch: each is looked up once, and where one is missing the public, slower way is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

PRIVATE = (
    "_C._len_torch_dispatch_stack",
    "_C._len_torch_function_stack",
    "_C._functorch.peek_interpreter_stack",
    "_C._get_tracing_state",
    "_C._autograd._profiler_enabled",
    "_C._autograd._get_current_graph_task_keep_graph",
)
"""Names below `torch` that this module uses."""


def find(path: str) -> Callable[..., Any] | None:
    """The function at `path` below torch; None if this version lacks it."""
    value: Any = torch
    for name in path.split("."):
        value = getattr(value, name, None)
    return value  # type: ignore[no-any-return]


_dispatch_modes, _function_modes, _transforms, _tracer, _profiler, _keep_graph = map(find, PRIVATE)


def dispatcher_is_watched() -> bool:
    """Whether a mode, a transform, a tracer or a profiler wants to see the operators that run now.

    Public way: True. An operator may then be called through the dispatcher, which is always right.
    """
    if not (_dispatch_modes and _function_modes and _transforms and _tracer and _profiler):
        return True
    return bool(
        _dispatch_modes() > 0
        or _function_modes() > 0
        or _transforms() is not None
        or _tracer() is not None
        or _profiler()
    )


def backward_keeps_graph() -> bool:
    """Inside a backward pass: whether saved tensors are needed again (`retain_graph=True`).

    Public way: True. A saved tensor is then left as it is, and its product takes memory of its own.
    """
    return True if _keep_graph is None else bool(_keep_graph())
