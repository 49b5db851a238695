"""The operator behind the public loss: schema, fake kernel, choice of backend, and its gradient.

``torch.ops.amtss_fast.amtss_loss`` computes the loss and, in the same pass, its gradient with respect to the student's
logits. It is functional and opaque to ``torch.compile``: what needs the values of a tensor (labels in range, weights
not negative) and what needs the machine (which backend is there) is decided inside it.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

_SCHEMA = """amtss_loss(
    Tensor student_logits, Tensor[] teacher_logits, Tensor?[] teacher_row_max, Tensor?[] teacher_step,
    Tensor? labels, Tensor? teacher_prior, Tensor? teacher_mask, Tensor? sample_weight, Tensor? num_items,
    float temperature, str weighting, float weight_temperature, float kd_weight, float ce_weight,
    float label_smoothing, int ignore_index, int unlabeled_index, str reduction,
    bool need_grad, bool need_stats, str? backend
) -> (Tensor loss, Tensor grad, Tensor weights, Tensor margins, Tensor kd, Tensor student_margin)"""

# The module of each backend. A backend is a module with `why_missing`, `why_not` and `amtss_loss`.
BACKENDS = {
    "cpu": "amtss_fast.cpu",
    "triton": "amtss_fast._triton",
    "reference": "amtss_fast.reference",
}
# What `backend=None` tries, best first.
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")}

# Loss and gradient; then, where they are asked for, weights, margins, kd and student_margin.
Outputs = tuple[Tensor, ...]


@functools.cache
def why_missing(name: str) -> str | None:
    """Why backend `name` cannot run on this machine; None if it can."""
    reason: str | None = _module(name).why_missing()
    return reason


@functools.cache
def _module(name: str) -> ModuleType:
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {sorted(BACKENDS)} or None, got {name!r}")
    return importlib.import_module(BACKENDS[name])


def choose_backend(backend: str | None, student_logits: Tensor, teacher_logits: Sequence[Tensor]) -> ModuleType:
    """The backend's module: the one asked for, else the first of the device that runs these tensors.

    Raises ValueError for an unknown name, RuntimeError for a backend that is missing or cannot run them.
    """
    if backend is not None:
        module = _module(backend)
        if (reason := why_missing(backend)) is not None:
            raise RuntimeError(f"backend {backend!r} is not available: {reason}")
        if (reason := module.why_not(student_logits, teacher_logits)) is not None:
            raise RuntimeError(f"backend {backend!r} cannot run these tensors: {reason}")
        return module
    for name in _PREFERENCE.get(student_logits.device.type, ("reference",)):
        if why_missing(name) is None and _module(name).why_not(student_logits, teacher_logits) is None:
            return _module(name)
    raise AssertionError("the reference runs everything")


def accumulation_dtype(student_logits: Tensor) -> torch.dtype:
    """The dtype of sums, loss and stats: float32, or float64 where the student's logits are."""
    return torch.float64 if student_logits.dtype == torch.float64 else torch.float32


def gradient_dtype(student_logits: Tensor) -> torch.dtype:
    """The dtype of the saved gradient: the student's, but float32 for float16.

    A mean over many rows underflows in float16 before the factor of a GradScaler reaches it in the backward pass.
    """
    return torch.float32 if student_logits.dtype == torch.float16 else student_logits.dtype


def values_are_free(tensor: Tensor) -> bool:
    """Whether looking at its values costs nothing, or is asked for: on an accelerator it waits for the device."""
    return tensor.device.type == "cpu" or os.environ.get("AMTSS_DEBUG") == "1"


def check_values(given: Arguments) -> None:
    """Raise ValueError for values outside their range."""
    n_classes, labels, num_items = given.student_logits.shape[1], given.labels, given.num_items
    ignore_index, unlabeled_index = given.ignore_index, given.unlabeled_index
    if labels is not None:
        special = (labels == ignore_index) | (labels == unlabeled_index)
        wrong = ((labels < 0) | (labels >= n_classes)) & ~special
        if wrong.any():
            row = int(wrong.nonzero()[0, 0])
            raise_label(int(labels[row]), row, n_classes, ignore_index, unlabeled_index)
    for name, weight in (("teacher_prior", given.teacher_prior), ("sample_weight", given.sample_weight)):
        if weight is not None:
            # Written so that NaN is wrong too.
            wrong = ~((weight >= 0) & (weight < float("inf")))
            if wrong.any():
                raise_weight(name, float(weight[wrong][0]))
    if num_items is not None and not 0 < float(num_items) < float("inf"):
        raise ValueError(f"num_items must be positive and finite, got {float(num_items)}")


def raise_label(label: int, row: int, n_classes: int, ignore_index: int, unlabeled_index: int) -> None:
    """The error for a label that is neither a class nor one of the two special values."""
    raise ValueError(
        f"labels[{row}] = {label} is not allowed: expected 0 to {n_classes - 1}, "
        f"{ignore_index} (ignore_index) or {unlabeled_index} (unlabeled_index)"
    )


def raise_weight(name: str, value: float) -> None:
    """The error for a negative or non-finite entry of a weight tensor."""
    raise ValueError(f"{name} must hold finite numbers >= 0, found {value}")


class Arguments(NamedTuple):
    """What the operator hands to a backend, by name: the schema's arguments less `backend`."""

    student_logits: Tensor
    teacher_logits: list[Tensor]
    teacher_row_max: list[Tensor | None]
    teacher_step: list[Tensor | None]
    labels: Tensor | None
    teacher_prior: Tensor | None
    teacher_mask: Tensor | None
    sample_weight: Tensor | None
    num_items: Tensor | None
    temperature: float
    weighting: str
    weight_temperature: float
    kd_weight: float
    ce_weight: float
    label_smoothing: float
    ignore_index: int
    unlabeled_index: int
    reduction: str
    need_grad: bool
    need_stats: bool


def _compute(*arguments: Any) -> Outputs:
    *values, backend = arguments
    given = Arguments(*values)
    module = choose_backend(backend, given.student_logits, given.teacher_logits)
    if not module.CHECKS_VALUES and values_are_free(given.student_logits):
        check_values(given)
    outputs: Outputs = module.amtss_loss(given)
    return outputs


def _amtss_loss(*arguments: Any) -> Outputs:
    outputs = _compute(*arguments)
    # An operator has as many outputs at every call, and no two of them may be the same tensor.
    return *outputs, *(outputs[0].new_empty(0) for _ in range(6 - len(outputs)))


def _amtss_loss_fake(
    student_logits: Tensor,
    teacher_logits: list[Tensor],
    *args: Any,
) -> Outputs:
    *_, reduction, need_grad, need_stats, _backend = args
    n_rows, n_classes = student_logits.shape
    dtype = accumulation_dtype(student_logits)
    new = functools.partial(student_logits.new_empty, dtype=dtype)
    per_teacher = (len(teacher_logits), n_rows) if need_stats else (0,)
    return (
        new(n_rows if reduction == "none" else ()),
        student_logits.new_empty((n_rows, n_classes) if need_grad else (0,), dtype=gradient_dtype(student_logits)),
        new(per_teacher),
        new(per_teacher),
        new(per_teacher),
        new(n_rows if need_stats else 0),
    )


_library = torch.library.Library("amtss_fast", "DEF")
_library.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
# One implementation for every device: the backend is an argument, not a dispatch key.
_library.impl("amtss_loss", _amtss_loss, "CompositeExplicitAutograd")
torch.library.register_fake("amtss_fast::amtss_loss", _amtss_loss_fake, lib=_library)


class _AttachGradient(torch.autograd.Function):
    """The loss, with the gradient that was computed beside it; backward only scales that."""

    @staticmethod
    def forward(ctx: Any, student_logits: Tensor, computed: tuple[Tensor, Tensor]) -> Tensor:
        # In a tuple: what torch sees as an input could not be passed on without a copy, because the caller may change
        # its loss in place.
        loss, grad = computed
        ctx.save_for_backward(grad)
        ctx.student_dtype = student_logits.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None]:
        # `once_differentiable` would pass a constant on where grad_loss itself needs no gradient.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("amtss_loss has no second derivative: call backward without create_graph=True")
        (grad,) = ctx.saved_tensors
        return scale_saved_gradient(grad, grad_loss, ctx.student_dtype), None


def scale_saved_gradient(grad: Tensor, grad_loss: Tensor, dtype: torch.dtype) -> Tensor:
    """Grad [N, C] times grad_loss ([] or [N]), without a second [N, C] buffer where that is safe."""
    compiling = torch.compiler.is_compiling()
    on_cpu = not compiling and grad_loss.dim() == 0 and grad_loss.device.type == "cpu"
    if on_cpu and dtype == grad.dtype and grad_loss.item() == 1.0:
        return grad
    # With retain_graph the saved gradient is needed again.
    kept = not compiling and torch._C._autograd._get_current_graph_task_keep_graph()
    if _scales_on_device(grad, grad_loss):
        out = torch.empty_like(grad, dtype=dtype) if kept or dtype != grad.dtype else grad
        scaled: Tensor = _module("triton").scale_gradient(grad, grad_loss, out)
        return scaled
    scale = grad_loss.to(grad.dtype)
    if scale.dim() == 1:
        scale = scale.unsqueeze(-1)
    if compiling or dtype != grad.dtype:
        return (grad * scale).to(dtype)
    return grad * scale if kept else grad.mul_(scale)


def _scales_on_device(grad: Tensor, grad_loss: Tensor) -> bool:
    # A kernel of our own sees there that the factor is 1, as in loss.backward(), and leaves the gradient alone.
    return (
        grad.is_cuda
        and grad.dtype != torch.float64
        and grad_loss.dim() == 0
        and not torch.compiler.is_compiling()
        and why_missing("triton") is None
    )


_PLAIN = (Tensor, torch.nn.Parameter)


def _dispatcher_is_needed(student_logits: Tensor, teacher_logits: Sequence[Tensor]) -> bool:
    """Whether a compiler, a mode, a transform or a profiler wants to see the operator, or a tensor is of a subclass.

    Otherwise it is called directly: on small batches the dispatcher would cost more than the kernel.
    """
    return (
        torch.compiler.is_compiling()
        or type(student_logits) not in _PLAIN
        or any(type(teacher) not in _PLAIN for teacher in teacher_logits)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    )


def run(student_logits: Tensor, *args: Any, need_stats: bool, backend: str | None) -> tuple[Tensor, ...]:
    """The loss, and with `need_stats` the four stats. `args`: the operator's from `teacher_logits` to `reduction`."""
    need_grad = torch.is_grad_enabled() and student_logits.requires_grad
    needed = _dispatcher_is_needed(student_logits, args[0])
    compute = torch.ops.amtss_fast.amtss_loss if needed else _compute
    with torch.no_grad():
        loss, grad, *stats = compute(student_logits, *args, need_grad, need_stats, backend)
    if need_grad:
        loss = _AttachGradient.apply(student_logits, (loss, grad))
    return (loss, *stats) if need_stats else (loss,)
