"""The operator behind :func:`amtss_fast.linear_amtss_loss`: its schema, its fake kernel and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from amtss_fast.loss.contract import AMTSSStats
from amtss_fast.loss.linear_compute import LinearInputs, Needs, Outputs, Scalings, compute, new_outputs
from amtss_fast.loss.ops import scale_saved_gradient, schema_of, use_one_thread_after_fork
from amtss_fast.loss.options import OPTION_NAMES, LossOptions
from amtss_fast.loss.registry import check_name

_SCHEMA = f"""linear_amtss_loss(
    {schema_of(LinearInputs)}, {schema_of(LossOptions)},
    float student_scale, float student_softcap, float[] teacher_scale, float[] teacher_softcap,
    Tensor? grad_loss, int? chunk_rows,
    bool need_grad_hidden, bool need_grad_weight, bool need_grad_bias, bool need_stats, str? backend
) -> (Tensor loss, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias,
      {schema_of(AMTSSStats)})"""
_N_INPUTS, _N_OPTIONS = len(LinearInputs._fields), len(OPTION_NAMES)


def _linear_amtss_loss(*arguments: Any) -> Outputs:
    inputs = LinearInputs(*arguments[:_N_INPUTS])
    options = LossOptions(*arguments[_N_INPUTS : _N_INPUTS + _N_OPTIONS])
    *scalings, grad_loss, chunk_rows, on_hidden, on_weight, on_bias, need_stats, backend = arguments[
        _N_INPUTS + _N_OPTIONS :
    ]
    needs = Needs(on_hidden, on_weight, on_bias)
    use_one_thread_after_fork()
    # The dtypes of the products are settled here, under autocast too.
    with torch.autocast(inputs.student_hidden.device.type, enabled=False):
        return compute(inputs, options, Scalings(*scalings), grad_loss, chunk_rows, needs, need_stats, backend)


def _linear_amtss_loss_fake(*arguments: Any) -> Outputs:
    inputs = LinearInputs(*arguments[:_N_INPUTS])
    reduction = arguments[_N_INPUTS + OPTION_NAMES.index("reduction")]
    *_, on_hidden, on_weight, on_bias, need_stats, _backend = arguments
    return new_outputs(inputs, reduction, Needs(on_hidden, on_weight, on_bias), need_stats)


_library = torch.library.Library("amtss_fast", "FRAGMENT")
_library.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("linear_amtss_loss", _linear_amtss_loss, "CompositeExplicitAutograd")
torch.library.register_fake("amtss_fast::linear_amtss_loss", _linear_amtss_loss_fake, lib=_library)


class _LinearAMTSSLoss(torch.autograd.Function):
    """Saves the gradients that the forward pass has computed; backward only scales them.

    Where every row has a factor of its own (reduction="none") the head's gradient cannot be scaled afterwards: there
    backward runs the operator again, with the factors.
    """

    @staticmethod
    def forward(
        ctx: Any,
        needs: Needs,
        inputs: tuple[Any, ...],
        options: tuple[Any, ...],
        settings: tuple[int | None, bool, str | None],
        *student: Tensor | None,
    ) -> tuple[Tensor, ...]:
        # The student's tensors are separate arguments, because autograd tracks those only; `inputs` are the others.
        # `options` are those of the loss and the scalings.
        chunk_rows, need_stats, backend = settings
        ctx.per_row = options[OPTION_NAMES.index("reduction")] == "none"
        now = Needs(False, False, False) if ctx.per_row else needs
        loss, *outputs = torch.ops.amtss_fast.linear_amtss_loss(
            *student, *inputs, *options, None, chunk_rows, *now, need_stats, backend
        )
        grads, stats = outputs[:3], outputs[3:]
        ctx.needs = needs
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in student]
        if ctx.per_row:
            teachers, bucket, rows = inputs[:6], inputs[6], inputs[7:]
            ctx.save_for_backward(*student, *rows, *(tensor for tensors in teachers for tensor in tensors))
            ctx.lengths = [len(tensors) for tensors in teachers]
            ctx.rest = (bucket, options, chunk_rows, backend)
        else:
            ctx.save_for_backward(*grads)
        if not need_stats:
            return (loss,)
        ctx.mark_non_differentiable(*stats)
        return loss, *stats

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("linear_amtss_loss has no second derivative: call backward without create_graph=True")
        saved = ctx.saved_tensors
        if ctx.per_row:
            student, rows, tensors = saved[:3], saved[3:8], list(saved[8:])
            teachers = [[tensors.pop(0) for _ in range(length)] for length in ctx.lengths]
            bucket, options, chunk_rows, backend = ctx.rest
            _, *outputs = torch.ops.amtss_fast.linear_amtss_loss(
                *student, *teachers, bucket, *rows, *options, grad_loss, chunk_rows, *ctx.needs, False, backend
            )
            grads = [
                grad.to(dtype) if need else None
                for grad, dtype, need in zip(outputs[:3], ctx.dtypes, ctx.needs, strict=True)
            ]
        else:
            grads = [
                scale_saved_gradient(grad, grad_loss, dtype) if need else None
                for grad, dtype, need in zip(saved, ctx.dtypes, ctx.needs, strict=True)
            ]
        return None, None, None, None, *grads


def run(
    inputs: LinearInputs,
    options: LossOptions,
    scalings: Scalings,
    *,
    chunk_rows: int | None,
    need_stats: bool,
    backend: str | None,
) -> tuple[Tensor, AMTSSStats | None]:
    """The loss, with gradients for what needs them, and with `need_stats` the stats."""
    check_name(backend)
    student, others, values = inputs[:3], inputs[3:], (*options.values(len(inputs.teacher_hidden)), *scalings)
    needs = Needs(*(tensor is not None and tensor.requires_grad for tensor in student))
    if torch.is_grad_enabled() and any(needs):
        settings = (chunk_rows, need_stats, backend)
        loss, *stats = _LinearAMTSSLoss.apply(needs, tuple(others), values, settings, *student)
    else:
        needs = Needs(False, False, False)
        loss, _, _, _, *stats = torch.ops.amtss_fast.linear_amtss_loss(
            *inputs, *values, None, chunk_rows, *needs, need_stats, backend
        )
    return loss, AMTSSStats(*stats) if need_stats else None
