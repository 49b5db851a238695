"""The operator behind the public loss: its schema, its fake kernel and its gradient.

`torch.ops.amtss_fast.amtss_loss` computes the loss and, in the same pass, its gradient with respect to the student's
logits. It is functional and opaque to `torch.compile`: what depends on the values of a tensor (labels in range, weights
not negative) and on the machine (which backend it has) is decided inside it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any, Literal, get_origin, get_type_hints

import torch
from torch import Tensor

from amtss_fast._compat.torch import backward_keeps_graph, dispatcher_is_watched
from amtss_fast.loss.checks import check_teacher_values, check_values, values_are_free
from amtss_fast.loss.contract import (
    AMTSSStats,
    LossInputs,
    LossOutputs,
    accumulation_dtype,
    empty_stats,
    gradient_dtype,
)
from amtss_fast.loss.options import OPTION_NAMES, LossOptions
from amtss_fast.loss.registry import best_backend, check_name, choose_backend

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor]: "Tensor[]",
    list[Tensor | None]: "Tensor?[]",
    list[bool]: "bool[]",
    float: "float",
    float | None: "float?",
    float | Sequence[float] | None: "float[]?",
    int: "int",
}


def schema_of(record: type) -> str:
    """The fields of a record as arguments in an operator's schema."""
    hints = get_type_hints(record)
    return ", ".join(
        f"{'str' if get_origin(kind) is Literal else _SCHEMA_TYPES[kind]} {name}" for name, kind in hints.items()
    )


_SCHEMA = f"""amtss_loss(
    {schema_of(LossInputs)}, {schema_of(LossOptions)}, bool need_grad, bool need_stats, str? backend
) -> (Tensor loss, Tensor grad, {schema_of(AMTSSStats)})"""
_N_INPUTS, _N_OPTIONS = len(LossInputs._fields), len(OPTION_NAMES)


def _compute(
    inputs: LossInputs, options: LossOptions, need_grad: bool, need_stats: bool, backend: str | None
) -> LossOutputs:
    chosen = choose_backend(backend, inputs, options)
    if values_are_free(inputs.student_logits):
        check_teacher_values("teacher_logits", inputs)
        if not chosen.CHECKS_VALUES:
            check_values(inputs, options)
    return chosen.amtss_loss(inputs, options, need_grad=need_grad, need_stats=need_stats)


def _amtss_loss(*arguments: Any) -> tuple[Tensor, ...]:
    inputs = LossInputs(*arguments[:_N_INPUTS])
    options = LossOptions(*arguments[_N_INPUTS : _N_INPUTS + _N_OPTIONS])
    loss, grad, stats = _compute(inputs, options, *arguments[_N_INPUTS + _N_OPTIONS :])
    # An operator has the same number of outputs at every call, and no two of them may be the same tensor.
    empty = loss.new_empty
    if grad is None:
        grad = empty(0, dtype=gradient_dtype(inputs.student_logits))
    return loss, grad, *(stats or [empty(0) for _ in AMTSSStats._fields])


def _amtss_loss_fake(*arguments: Any) -> tuple[Tensor, ...]:
    student_logits, teacher_logits = arguments[:2]
    options = dict(zip(OPTION_NAMES, arguments[_N_INPUTS:], strict=False))
    need_grad, need_stats, _ = arguments[_N_INPUTS + _N_OPTIONS :]
    n_rows, n_classes = student_logits.shape
    new = functools.partial(student_logits.new_empty, dtype=accumulation_dtype(student_logits))
    return (
        new(n_rows if options["reduction"] == "none" else ()),
        student_logits.new_empty((n_rows, n_classes) if need_grad else (0,), dtype=gradient_dtype(student_logits)),
        *(empty_stats(new, len(teacher_logits), n_rows) if need_stats else [new((0,)) for _ in AMTSSStats._fields]),
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
        # In a tuple: autograd would need a copy of a loss that is an input of its own, because the caller may change
        # the loss in place.
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


_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_note_fork)


def use_one_thread_after_fork() -> None:
    """Called before operations of torch on large CPU tensors.

    A child of fork() has none of the threads of torch's OpenMP library, and torch would wait for them forever.
    """
    if _forked and torch.get_num_threads() > 1:
        torch.set_num_threads(1)


def scale_saved_gradient(grad: Tensor, grad_loss: Tensor, dtype: torch.dtype) -> Tensor:
    """Grad [N, C] times grad_loss ([] or [N]), without a second [N, C] buffer where that is safe."""
    if torch.compiler.is_compiling():
        return (grad * _factor(grad, grad_loss)).to(dtype)
    one_factor = grad_loss.dim() == 0
    if one_factor and grad_loss.device.type == "cpu" and dtype == grad.dtype and grad_loss.item() == 1.0:
        return grad
    use_one_thread_after_fork()
    # With retain_graph the saved gradient is needed again.
    fresh = dtype != grad.dtype or backward_keeps_graph()
    scale_gradient = best_backend(grad.device).scale_gradient if one_factor and grad.dtype != torch.float64 else None
    if scale_gradient is not None:
        return scale_gradient(grad, grad_loss, torch.empty_like(grad, dtype=dtype) if fresh else grad)
    factor = _factor(grad, grad_loss)
    return (grad * factor).to(dtype) if fresh else grad.mul_(factor)


def _factor(grad: Tensor, grad_loss: Tensor) -> Tensor:
    factor = grad_loss.to(grad.dtype)
    return factor if factor.dim() == 0 else factor.unsqueeze(-1)


_PLAIN = (Tensor, torch.nn.Parameter)


def _dispatcher_is_needed(student_logits: Tensor, teacher_logits: Sequence[Tensor]) -> bool:
    """Whether the operator must be called through the dispatcher: for a compiler, a mode, or a subclass of Tensor.

    Otherwise the backend is called directly, because on small batches the dispatcher takes longer than the kernel.
    """
    return (
        torch.compiler.is_compiling()
        or type(student_logits) not in _PLAIN
        or any(type(teacher) not in _PLAIN for teacher in teacher_logits)
        or dispatcher_is_watched()
    )


def run(
    inputs: LossInputs, options: LossOptions, *, need_stats: bool, backend: str | None
) -> tuple[Tensor, AMTSSStats | None]:
    """The loss, with a gradient where the student's logits need one, and with `need_stats` the stats."""
    check_name(backend)
    student_logits = inputs.student_logits
    need_grad = torch.is_grad_enabled() and student_logits.requires_grad
    with torch.no_grad():
        if _dispatcher_is_needed(student_logits, inputs.teacher_logits):
            loss, grad, *parts = torch.ops.amtss_fast.amtss_loss(
                *inputs, *options.values(len(inputs.teacher_logits)), need_grad, need_stats, backend
            )
            stats = AMTSSStats(*parts) if need_stats else None
        else:
            loss, grad, stats = _compute(inputs, options, need_grad, need_stats, backend)
    if need_grad:
        loss = _AttachGradient.apply(student_logits, (loss, grad))
    return loss, stats
