"""What the operator of the fused head computes: heads and loss of a chunk of rows at a time.

A chunk's logits are made, its loss and gradient come from a backend of the loss, and the gradient goes at once into the
products that give the gradients of hidden states and head. Memory is two [rows, C] matrices and, for each teacher, one
of the rows that it teaches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amtss_fast.loss.checks import check_teacher_values, check_values, values_are_free
from amtss_fast.loss.chunks import Chunk, cut, side_by_side, taught_rows
from amtss_fast.loss.contract import AMTSSStats, LossInputs, accumulation_dtype, empty_stats, gradient_dtype
from amtss_fast.loss.head import Head, Scaling, Scratch, default_chunk_rows, padded_classes
from amtss_fast.loss.options import LossOptions
from amtss_fast.loss.registry import choose_backend


class LinearInputs(NamedTuple):
    """The tensors of one call, N rows, C classes, K teachers. Shapes, dtypes and devices have been checked."""

    student_hidden: Tensor
    """[N, H] floating."""
    student_weight: Tensor
    """[C, H] floating."""
    student_bias: Tensor | None
    """[C] floating."""
    teacher_hidden: list[Tensor]
    """K of [N, H_k] floating, [N_k, H_k] for a teacher with rows of its own; [N, k] or [N_k, k] log-probabilities for
    one without a head."""
    teacher_weight: list[Tensor | None]
    """K of [C_k, H_k]: floating, or int8 codes where `teacher_code_scale` is given; None for log-probabilities."""
    teacher_code_scale: list[Tensor | None]
    """K of [C_k] floating, None for a teacher without codes."""
    teacher_bias: list[Tensor | None]
    """K of [C_k] floating, or None."""
    teacher_rows: list[Tensor | None]
    teacher_indices: list[Tensor | None]
    teacher_bucket: list[bool]
    labels: Tensor | None
    teacher_prior: Tensor | None
    teacher_mask: Tensor | None
    sample_weight: Tensor | None
    num_items: Tensor | None
    """The last eight as in :class:`~amtss_fast.loss.contract.LossInputs`."""


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


# Loss, three gradients, the stats.
Outputs = tuple[Tensor, ...]

# A label that is impossible at any number of classes.
_NO_CLASS = 2**62


@torch.no_grad()
def compute(
    inputs: LinearInputs,
    options: LossOptions,
    scalings: Scalings,
    grad_loss: Tensor | None,
    chunk_rows: int | None,
    needs: Needs,
    need_stats: bool,
    backend: str | None,
) -> Outputs:
    """Loss, gradients of the student and stats; of `grad_loss` [N] times the loss where that is given."""
    student_hidden, device = inputs.student_hidden, inputs.student_hidden.device
    n_rows, n_classes = len(student_hidden), len(inputs.student_weight)
    scratch = Scratch(device)
    student, teachers = _heads(inputs, scalings, scratch)
    call = _call(inputs, student, teachers)
    chosen = choose_backend(backend, call, options)
    if values_are_free(student_hidden):
        # Checked here, because a backend gets chunks and would name a row of the chunk.
        check_values(call, options)
        check_teacher_values("teacher_hidden", call)

    kept = _kept_rows(inputs.labels, options.ignore_index)
    n_kept = n_rows if kept is None else len(kept)
    row_length = _row_length(inputs, options)
    call = _for_chunks(call, options, n_kept, row_length)
    if options.kd_weight == 0 and not need_stats:
        # Nobody looks at the teachers.
        teachers, call = [], call._replace(teacher_rows=[], teacher_indices=[], teacher_bucket=[])

    taught = [
        taught_rows(_entry(call.teacher_rows, k), _teaches(call, k), kept, n_kept, n_rows) for k in range(len(teachers))
    ]
    kept, taught = side_by_side(kept, n_kept, taught)

    def length(most_teachers: int) -> int:
        return chunk_rows or default_chunk_rows(n_kept, n_classes, most_teachers, student.dtype.itemsize, device)

    chunks = cut(kept, n_kept, taught, [teacher is not None for teacher in teachers], length)
    _reserve(chunks, teachers, row_length, scratch)

    outputs = new_outputs(inputs, options.reduction, needs, need_stats)
    loss, grads, stats = outputs[0], outputs[1:4], outputs[4:]
    _clear(loss, grads, stats, n_kept, n_rows)
    for chunk in chunks:
        part = _part(call, chunk, row_length, student, teachers, scratch)
        chunk_loss, grad, chunk_stats = chosen.amtss_loss(part, options, need_grad=any(needs), need_stats=need_stats)
        if options.reduction == "none":
            loss[chunk.pick] = chunk_loss
        else:
            loss.add_(chunk_loss)
        for stat, chunk_stat in zip(stats, chunk_stats or (), strict=False):
            stat[..., chunk.pick] = chunk_stat
        if grad is not None:
            if grad_loss is not None:
                grad *= grad_loss[chunk.pick].unsqueeze(-1)
            first = chunk is chunks[0]
            student.add_gradients(chunk.pick, grad, part.student_logits, first, *grads)
        # Freed before the next chunk has one.
        del grad
    return outputs


def _clear(loss: Tensor, grads: Sequence[Tensor], stats: Sequence[Tensor], n_kept: int, n_rows: int) -> None:
    """Makes 0 what the chunks add to or do not write."""
    loss.zero_()
    if n_kept < n_rows or n_kept == 0:
        for output in (grads[0], *stats):
            output.zero_()
    if n_kept == 0:
        for output in grads[1:]:
            output.zero_()


def _heads(inputs: LinearInputs, scalings: Scalings, scratch: Scratch) -> tuple[Head, list[Head | None]]:
    """The student's and the teachers'; None for a teacher that has none."""
    n_classes = len(inputs.student_weight)

    def head(hidden: Tensor, weight: Tensor, codes: Tensor | None, bias: Tensor | None, *scaling: float) -> Head:
        return Head(hidden, weight, codes, bias, Scaling(*scaling), n_classes, scratch)

    teachers = zip(
        inputs.teacher_hidden,
        inputs.teacher_weight,
        inputs.teacher_code_scale,
        inputs.teacher_bias,
        scalings.teacher_scale,
        scalings.teacher_softcap,
        strict=True,
    )
    student = inputs.student_hidden, inputs.student_weight, None, inputs.student_bias
    return (
        head(*student, scalings.student_scale, scalings.student_softcap),
        [None if weight is None else head(hidden, weight, *rest) for hidden, weight, *rest in teachers],
    )


def _call(inputs: LinearInputs, student: Head, teachers: Sequence[Head | None]) -> LossInputs:
    """The call of the backend; in the place of the logits of heads are tensors that take no memory."""
    n_rows, n_classes = len(inputs.student_hidden), len(inputs.student_weight)
    return LossInputs(
        inputs.student_hidden.new_empty(1, 1, dtype=student.dtype).expand(n_rows, n_classes),
        [
            logprobs if teacher is None else logprobs.new_empty(0, n_classes, dtype=teacher.dtype)
            for logprobs, teacher in zip(inputs.teacher_hidden, teachers, strict=True)
        ],
        [],
        [],
        inputs.teacher_rows,
        inputs.teacher_indices,
        inputs.teacher_bucket,
        inputs.labels,
        inputs.teacher_prior,
        inputs.teacher_mask,
        inputs.sample_weight,
        inputs.num_items,
    )


def _for_chunks(call: LossInputs, options: LossOptions, n_kept: int, row_length: int) -> LossInputs:
    """The call with what a backend cannot learn from a chunk of `row_length` classes."""
    n_rows, n_classes = call.student_logits.shape
    num_items, prior, labels = call.num_items, call.teacher_prior, call.labels
    if options.reduction == "mean" and num_items is None:
        num_items = torch.full((), max(1, n_kept), dtype=torch.float64, device=call.student_logits.device)
    if prior is not None:
        prior = prior.reshape(len(call.teacher_logits), -1).expand(-1, n_rows)
    if labels is not None and row_length > n_classes:
        labels = _hide_padding(labels, n_classes, options)
    return call._replace(num_items=num_items, teacher_prior=prior, labels=labels)


def _row_length(inputs: LinearInputs, options: LossOptions) -> int:
    """How many classes a row of logits has; those beyond C are -inf for every model."""
    n_classes = len(inputs.student_weight)
    # Smoothed labels would have mass there, and so would a teacher whose list holds all classes but for rounding.
    smooths = options.ce_weight > 0 and options.label_smoothing > 0
    lists_all = any(listed is not None and listed.shape[1] >= n_classes for listed in inputs.teacher_indices)
    return n_classes if smooths or lists_all else padded_classes(n_classes, inputs.student_hidden.device)


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


def _entry(values: Sequence[Tensor | None], k: int) -> Tensor | None:
    return values[k] if values else None


def _teaches(call: LossInputs, k: int) -> Tensor | None:
    """Whether teacher `k` teaches each row [N], by its mask and prior [K, N]; None: everywhere, or not known."""
    teaches = [] if call.teacher_mask is None else [call.teacher_mask[k]]
    if call.teacher_prior is not None:
        teaches.append(call.teacher_prior[k] > 0)
    # On an accelerator, finding out would wait for the device.
    if not teaches or teaches[0].device.type != "cpu":
        return None
    both = torch.stack(teaches).all(0)
    return None if both.all() else both


def _reserve(chunks: Sequence[Chunk], teachers: Sequence[Head | None], row_length: int, scratch: Scratch) -> None:
    """Makes the memory for the teachers' logits of any chunk, which hold the rows of one teacher after the other."""
    for dtype in {head.dtype for head in teachers if head is not None}:
        same = [k for k, head in enumerate(teachers) if head is not None and head.dtype == dtype]
        most = max((sum(chunk.n_taught(k) for k in same) for chunk in chunks), default=0)
        scratch("teachers", dtype, most, row_length)


def _part(
    call: LossInputs,
    chunk: Chunk,
    row_length: int,
    student: Head,
    teachers: Sequence[Head | None],
    scratch: Scratch,
) -> LossInputs:
    """The call on the rows of a chunk, with logits in `scratch`; without teachers the student's stand for theirs."""
    logits = scratch("student", student.dtype, chunk.n_rows, row_length)
    student.write_logits(chunk.pick, logits)
    teacher_logits, teacher_indices = [logits] * len(call.teacher_logits), list(call.teacher_indices)
    used = dict.fromkeys([head.dtype for head in teachers if head is not None], 0)
    for k, head in enumerate(teachers):
        source = chunk.sources[k]
        if head is None:
            teacher_logits[k] = call.teacher_logits[k][source]
            teacher_indices[k] = _take(call.teacher_indices[k], source, dim=0)
            continue
        begin = used[head.dtype]
        used[head.dtype] = end = begin + chunk.n_taught(k)
        teacher_logits[k] = scratch("teachers", head.dtype, end, row_length)[begin:]
        head.write_logits(source, teacher_logits[k])
    return call._replace(
        student_logits=logits,
        teacher_logits=teacher_logits,
        teacher_rows=[] if all(rows is None for rows in chunk.taught) else chunk.taught,
        teacher_indices=teacher_indices,
        labels=_take(call.labels, chunk.pick),
        teacher_prior=_take(call.teacher_prior, chunk.pick),
        teacher_mask=_take(call.teacher_mask, chunk.pick),
        sample_weight=_take(call.sample_weight, chunk.pick),
    )


def _take(tensor: Tensor | None, pick: slice | Tensor, dim: int = -1) -> Tensor | None:
    """The rows `pick` of a tensor whose rows are its first or last dimension."""
    if tensor is None:
        return None
    return tensor[pick] if dim == 0 else tensor[..., pick]


def new_outputs(inputs: LinearInputs, reduction: str, needs: Needs, need_stats: bool) -> Outputs:
    """Memory for what the operator returns; what is not wanted is empty."""
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
