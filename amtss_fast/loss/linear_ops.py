"""The operator behind :func:`amtss_fast.linear_amtss_loss`: heads and loss of a chunk of rows at a time.

A chunk's logits are made, its loss and gradient come from a backend of the loss, and the gradient goes at once into the
products that give the gradients of hidden states and head. Memory is (K + 2) [rows, C] matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amtss_fast.loss.checks import check_values, values_are_free
from amtss_fast.loss.contract import AMTSSStats, LossInputs, accumulation_dtype, empty_stats, gradient_dtype
from amtss_fast.loss.head import Head, Scaling, Scratch, default_chunk_rows, padded_classes
from amtss_fast.loss.ops import scale_saved_gradient, schema_of, use_one_thread_after_fork
from amtss_fast.loss.options import OPTION_NAMES, LossOptions
from amtss_fast.loss.registry import check_name, choose_backend


class LinearInputs(NamedTuple):
    """The tensors of one call, N rows, C classes, K teachers. Shapes, dtypes and devices have been checked."""

    student_hidden: Tensor
    """[N, H] floating."""
    student_weight: Tensor
    """[C, H] floating."""
    student_bias: Tensor | None
    """[C] floating."""
    teacher_hidden: list[Tensor]
    """K of [N, H_k] floating."""
    teacher_weight: list[Tensor]
    """K of [C_k, H_k]: floating, or int8 codes where `teacher_code_scale` is given."""
    teacher_code_scale: list[Tensor | None]
    """K of [C_k] floating, None for a teacher without codes."""
    teacher_bias: list[Tensor | None]
    """K of [C_k] floating, or None."""
    labels: Tensor | None
    teacher_prior: Tensor | None
    teacher_mask: Tensor | None
    sample_weight: Tensor | None
    num_items: Tensor | None
    """The last five as in :class:`~amtss_fast.loss.contract.LossInputs`."""


class Scalings(NamedTuple):
    """What each model does to its logits, as of :class:`~amtss_fast.loss.head.Scaling`."""

    student_scale: float
    student_softcap: float
    teacher_scale: Sequence[float]
    teacher_softcap: Sequence[float]


class Needs(NamedTuple):
    """Which gradients are wanted."""

    need_grad_hidden: bool
    need_grad_weight: bool
    need_grad_bias: bool


_SCHEMA = f"""linear_amtss_loss(
    {schema_of(LinearInputs)}, {schema_of(LossOptions)},
    float student_scale, float student_softcap, float[] teacher_scale, float[] teacher_softcap,
    Tensor? grad_loss, int? chunk_rows,
    bool need_grad_hidden, bool need_grad_weight, bool need_grad_bias, bool need_stats, str? backend
) -> (Tensor loss, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias,
      {schema_of(AMTSSStats)})"""
_N_INPUTS, _N_OPTIONS = len(LinearInputs._fields), len(OPTION_NAMES)

# Loss, three gradients, the stats.
Outputs = tuple[Tensor, ...]

# A label that is impossible at any number of classes.
_NO_CLASS = 2**62


@torch.no_grad()
def _compute(
    inputs: LinearInputs,
    options: LossOptions,
    scalings: Scalings,
    grad_loss: Tensor | None,
    chunk_rows: int | None,
    needs: Needs,
    need_stats: bool,
    backend: str | None,
) -> Outputs:
    use_one_thread_after_fork()
    student_hidden, device = inputs.student_hidden, inputs.student_hidden.device
    n_rows, n_classes, n_teachers = len(student_hidden), len(inputs.student_weight), len(inputs.teacher_hidden)
    scratch = Scratch(device)
    student = Head(
        student_hidden,
        inputs.student_weight,
        None,
        inputs.student_bias,
        Scaling(scalings.student_scale, scalings.student_softcap),
        n_classes,
        scratch,
    )
    teachers = [
        Head(hidden, weight, code_scale, bias, Scaling(scale, softcap), n_classes, scratch)
        for hidden, weight, code_scale, bias, scale, softcap in zip(
            inputs.teacher_hidden,
            inputs.teacher_weight,
            inputs.teacher_code_scale,
            inputs.teacher_bias,
            scalings.teacher_scale,
            scalings.teacher_softcap,
            strict=True,
        )
    ]
    empty = [head.hidden.new_empty(0, n_classes, dtype=head.dtype) for head in (student, *teachers)]
    # The call of the backend, without the chunk's tensors.
    call = LossInputs(
        empty[0],
        empty[1:],
        [],
        [],
        [],
        [],
        [],
        inputs.labels,
        inputs.teacher_prior,
        inputs.teacher_mask,
        inputs.sample_weight,
        inputs.num_items,
    )
    chosen = choose_backend(backend, call, options)
    if values_are_free(student_hidden):
        # Checked here, because a backend gets chunks and would name a row of the chunk.
        check_values(call, options)

    kept = _kept_rows(inputs.labels, options.ignore_index)
    n_kept = n_rows if kept is None else len(kept)
    if options.reduction == "mean" and inputs.num_items is None:
        call = call._replace(num_items=torch.full((), max(1, n_kept), dtype=torch.float64, device=device))
    if inputs.teacher_prior is not None:
        call = call._replace(teacher_prior=inputs.teacher_prior.reshape(n_teachers, -1).expand(-1, n_rows))
    # Smoothed labels would have mass beyond the last class.
    smooths = options.ce_weight > 0 and options.label_smoothing > 0
    row_length = n_classes if smooths else padded_classes(n_classes, device)
    if inputs.labels is not None and row_length > n_classes:
        call = call._replace(labels=_hide_padding(inputs.labels, n_classes, options))

    outputs = _new_outputs(inputs, options.reduction, needs, need_stats)
    loss, grad_hidden, grad_weight, grad_bias, *stats = outputs
    loss.zero_()
    if kept is not None or n_kept == 0:
        for output in (grad_hidden, *stats):
            output.zero_()
    if n_kept == 0:
        grad_weight.zero_()
        grad_bias.zero_()

    if chunk_rows is None:
        chunk_rows = default_chunk_rows(n_kept, n_classes, n_teachers, student.dtype.itemsize, device)
    asked = teachers if options.kd_weight > 0 or need_stats else []
    for begin in range(0, n_kept, chunk_rows):
        end = min(begin + chunk_rows, n_kept)
        pick = slice(begin, end) if kept is None else kept[begin:end]
        chunk = _chunk(call, pick, (end - begin, row_length), student, asked, scratch)
        chunk_loss, grad, chunk_stats = chosen.amtss_loss(chunk, options, need_grad=any(needs), need_stats=need_stats)
        if options.reduction == "none":
            loss[pick] = chunk_loss
        else:
            loss.add_(chunk_loss)
        for stat, chunk_stat in zip(stats, chunk_stats or (), strict=False):
            stat[..., pick] = chunk_stat
        if grad is not None:
            if grad_loss is not None:
                grad *= grad_loss[pick].unsqueeze(-1)
            student.add_gradients(pick, grad, chunk.student_logits, begin == 0, grad_hidden, grad_weight, grad_bias)
        # Freed before the next chunk has one.
        del grad
    return outputs


def _kept_rows(labels: Tensor | None, ignore_index: int) -> Tensor | None:
    """The rows that are not ignored; None: all of them.

    On an accelerator this waits for the device, because their number is needed on the host.
    """
    if labels is None:
        return None
    kept = (labels != ignore_index).nonzero().squeeze(1)
    return None if len(kept) == len(labels) else kept


def _hide_padding(labels: Tensor, n_classes: int, options: LossOptions) -> Tensor:
    """Labels of which none is taken for a class that fills a row up."""
    known = (labels < n_classes) | (labels == options.ignore_index) | (labels == options.unlabeled_index)
    return labels.where(known, _NO_CLASS)


def _chunk(
    call: LossInputs,
    pick: slice | Tensor,
    shape: tuple[int, int],
    student: Head,
    teachers: Sequence[Head],
    scratch: Scratch,
) -> LossInputs:
    """The call on the rows `pick`, with their logits in `scratch`; without teachers the student's stand for theirs."""
    chunk = call._replace(
        student_logits=scratch("student", student.dtype, *shape),
        labels=_take(call.labels, pick),
        teacher_prior=_take(call.teacher_prior, pick),
        teacher_mask=_take(call.teacher_mask, pick),
        sample_weight=_take(call.sample_weight, pick),
    )
    student.write_logits(pick, None, chunk.student_logits)
    teacher_logits = [chunk.student_logits] * len(call.teacher_logits)
    for k, teacher in enumerate(teachers):
        teacher_logits[k] = scratch(f"teacher {k}", teacher.dtype, *shape)
        taught = _taught(k, chunk.teacher_prior, chunk.teacher_mask)
        if taught is None or len(taught) > 0:
            teacher.write_logits(pick, taught, teacher_logits[k])
    return chunk._replace(teacher_logits=teacher_logits)


def _take(tensor: Tensor | None, pick: slice | Tensor) -> Tensor | None:
    return None if tensor is None else tensor[..., pick]


def _taught(k: int, prior: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """The rows of a chunk that teacher `k` teaches, from its prior and mask [K, n]; None: all of them."""
    teaches = [] if mask is None else [mask[k]]
    if prior is not None:
        teaches.append(prior[k] > 0)
    # On an accelerator, finding out would wait for the device.
    if not teaches or teaches[0].device.type != "cpu":
        return None
    everywhere = torch.stack(teaches).all(0)
    return None if everywhere.all() else everywhere.nonzero().squeeze(1)


def _new_outputs(inputs: LinearInputs, reduction: str, needs: Needs, need_stats: bool) -> Outputs:
    student_hidden, student_weight = inputs.student_hidden, inputs.student_weight
    n_rows, n_classes = student_hidden.shape[0], student_weight.shape[0]
    dtype = accumulation_dtype(student_hidden)

    def new(shape: Any, dtype: torch.dtype = dtype) -> Tensor:
        return student_hidden.new_empty(shape, dtype=dtype)

    return (
        new(n_rows if reduction == "none" else ()),
        new(student_hidden.shape if needs.need_grad_hidden else 0, gradient_dtype(student_hidden)),
        new(student_weight.shape if needs.need_grad_weight else 0),
        new(n_classes if needs.need_grad_bias else 0),
        *(empty_stats(new, len(inputs.teacher_hidden), n_rows) if need_stats else [new(0) for _ in AMTSSStats._fields]),
    )


def _linear_amtss_loss(*arguments: Any) -> Outputs:
    inputs = LinearInputs(*arguments[:_N_INPUTS])
    options = LossOptions(*arguments[_N_INPUTS : _N_INPUTS + _N_OPTIONS])
    *scalings, grad_loss, chunk_rows, on_hidden, on_weight, on_bias, need_stats, backend = arguments[
        _N_INPUTS + _N_OPTIONS :
    ]
    needs = Needs(on_hidden, on_weight, on_bias)
    # The dtypes of the products are settled here, under autocast too.
    with torch.autocast(inputs.student_hidden.device.type, enabled=False):
        return _compute(inputs, options, Scalings(*scalings), grad_loss, chunk_rows, needs, need_stats, backend)


def _linear_amtss_loss_fake(*arguments: Any) -> Outputs:
    inputs = LinearInputs(*arguments[:_N_INPUTS])
    reduction = arguments[_N_INPUTS + OPTION_NAMES.index("reduction")]
    *_, on_hidden, on_weight, on_bias, need_stats, _backend = arguments
    return _new_outputs(inputs, reduction, Needs(on_hidden, on_weight, on_bias), need_stats)


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
            teachers, rows = inputs[:4], inputs[4:]
            ctx.save_for_backward(*student, *rows, *(tensor for tensors in teachers for tensor in tensors))
            ctx.lengths = [len(tensors) for tensors in teachers]
            ctx.rest = (options, chunk_rows, backend)
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
            options, chunk_rows, backend = ctx.rest
            _, *outputs = torch.ops.amtss_fast.linear_amtss_loss(
                *student, *teachers, *rows, *options, grad_loss, chunk_rows, *ctx.needs, False, backend
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
