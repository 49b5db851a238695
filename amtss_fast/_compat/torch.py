"""Private interfaces of torch: each is looked up once, and where one is missing the public, slower way is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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
    """Whether a mode, a transform, a tracer or a profiler is active, which must be given every operator.

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


ONEDNN = ("ops.onednn.qlinear_prepack", "ops.onednn.qlinear_pointwise")
"""Operators of oneDNN, below `torch`, that torch does not document; builds for other CPUs lack them."""


def has_onednn_int8() -> bool:
    """Whether `pack_onednn` and `onednn_linear` run on this machine with this build of torch."""
    return "onednn" in torch.backends.quantized.supported_engines and all(map(find, ONEDNN))


def pack_onednn(codes: Tensor) -> Tensor:
    """Weights [out, in], int8, in oneDNN's own layout."""
    packed: Tensor = torch.ops.onednn.qlinear_prepack(codes, None)
    return packed


def onednn_linear(codes: Tensor, zero_point: int, packed: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """y[n, o] = scale[o] * sum_i (codes[n, i] - zero_point) * (weight[o, i] - offset[o]), in float32.

    Args:
        codes: uint8 [N, in].
        packed: `pack_onednn(weight)`.
        scale: float32 [out].
        offset: int64 [out].
    """
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, zero_point, packed, scale, offset, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return y


def inner_tensors(tensor: Tensor) -> list[Tensor]:
    """The tensors that hold the data of a wrapper, such as torchao's quantized weights; none of an ordinary tensor."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return []
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]
