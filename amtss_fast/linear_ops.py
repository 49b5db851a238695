"""The operator behind :func:`amtss_fast.linear_amtss_loss`: heads and loss of a chunk of rows at a time.

A chunk's logits are made, its loss and gradient come from the backend of :mod:`amtss_fast.ops`, and the gradient goes
at once into the products that give the gradients of hidden states and head. Memory is (K + 2) [rows, C] matrices.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from amtss_fast import ops

_SCHEMA = """linear_amtss_loss(
    Tensor student_hidden, Tensor student_weight, Tensor? student_bias,
    Tensor[] teacher_hidden, Tensor[] teacher_weight, Tensor?[] teacher_scale, Tensor?[] teacher_bias,
    Tensor? labels, Tensor? teacher_prior, Tensor? teacher_mask, Tensor? sample_weight, Tensor? num_items,
    float temperature, str weighting, float weight_temperature, float kd_weight, float ce_weight,
    float label_smoothing, int ignore_index, int unlabeled_index, str reduction, Tensor? grad_loss,
    int? chunk_rows, bool need_grad_hidden, bool need_grad_weight, bool need_grad_bias, bool need_stats, str? backend
) -> (Tensor loss, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias,
      Tensor weights, Tensor margins, Tensor kd, Tensor student_margin)"""

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class _Sizes(NamedTuple):
    """What suits a device."""

    # Bytes that the logits of a chunk may take. Fewer rows than `least_rows` make the products inefficient, so that
    # many classes may take more.
    chunk_bytes: int
    least_rows: int
    # Rows of a chunk are a multiple of this: whole vectors, or whole tiles of a product.
    rows: int
    # Classes of a block of a head: what the caches hold, or enough work for a launch.
    block: int
    # A row of logits is a multiple of this long. Products of half precision are fast where rows begin at 16 bytes and
    # dimensions are multiples of 8.
    classes: int


# A label that is impossible at any number of classes.
_NO_CLASS = 2**62

_CPU = _Sizes(128 << 20, 64, 16, 4096, 1)
_ACCELERATOR = _Sizes(1 << 30, 128, 128, 32768, 16)


def _sizes(device: torch.device) -> _Sizes:
    return _CPU if device.type == "cpu" else _ACCELERATOR


def default_chunk_rows(n_rows: int, n_classes: int, n_teachers: int, itemsize: int, device: torch.device) -> int:
    """Rows of a chunk: all chunks have about the same number."""
    sizes = _sizes(device)
    row_bytes = (n_teachers + 2) * n_classes * itemsize
    most = max(sizes.least_rows, sizes.chunk_bytes // row_bytes // sizes.rows * sizes.rows)
    n_chunks = max(1, math.ceil(n_rows / most))
    return sizes.rows * math.ceil(max(1, n_rows) / n_chunks / sizes.rows)


@functools.cache
def _adds_to_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch adds products of `dtype` to a float32 matrix without rounding them first, found by trying.

    Recent versions do, on CUDA.
    """
    x, total = torch.ones(16, 16, dtype=dtype, device=device), torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, x, x, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return True


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Add a @ b to `total`, in the precision of `total` whatever theirs is; with `first` overwrite it."""
    beta = float(not first)
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=beta)
    elif _adds_to_float32(a.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=beta)


@dataclass
class _Head:
    """One model's logits over the student's classes, hidden weight^T + bias, and how they are computed."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [C', H], floating or, with `scale`, int8
    scale: Tensor | None  # [C']
    bias: Tensor | None  # [C']
    n_classes: int  # of the student
    scratch: Callable[[str, torch.dtype, int, int], Tensor]

    def __post_init__(self) -> None:
        # The CPU has no fast products of half precision. An accelerator has, and there hidden states set the dtype.
        self.on_cpu = self.hidden.device.type == "cpu"
        self.dtype = ops.accumulation_dtype(self.hidden) if self.on_cpu else self.hidden.dtype

    def rows(self, pick: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """The hidden states of these rows, [n, H]."""
        return self.hidden[pick].to(dtype).contiguous()

    def blocks(self, n_classes: int, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
        """Begin and end of the head's blocks in products of `dtype`.

        On an accelerator all that needs no conversion is one block, and the classes that fill no unit are another: with
        them libraries choose kernels for any alignment, which take three times as long.
        """
        sizes = _sizes(self.hidden.device)
        rest = n_classes - n_classes % sizes.classes
        whole = not self.on_cpu and self.weight.dtype == dtype
        length = max(1, rest) if whole else sizes.block
        for begin in range(0, rest, length):
            yield begin, min(begin + length, rest)
        if rest < n_classes:
            yield rest, n_classes

    def classes(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """Rows [begin, end) of the head, without the scale of codes."""
        block = self.weight[begin:end]
        return block if block.dtype == dtype else self.scratch("weight", dtype, *block.shape).copy_(block)

    def write_logits(self, pick: slice | Tensor, taught: Tensor | None, out: Tensor) -> None:
        """Fill `out` [n, C or more] with the logits of these rows; of `taught` ones alone where that is given.

        Classes that this model lacks are -inf, classes that only it has are left out.
        """
        n_classes = min(len(self.weight), self.n_classes)
        out[:, n_classes:].fill_(-math.inf)
        rows = self.rows(pick, self.dtype)
        if taught is not None:
            rows = rows[taught]
        for begin, end in self.blocks(n_classes, self.dtype):
            target = out[:, begin:end]
            # CPU libraries are faster with the rows side by side in memory, so much that a copy pays.
            aside = self.on_cpu or taught is not None
            block = self.scratch("block", self.dtype, end - begin, len(rows)).t() if aside else target
            head = self.classes(begin, end, self.dtype).t()
            bias = None if self.bias is None else self.bias[begin:end]
            if bias is not None and self.scale is None:
                torch.addmm(bias.to(self.dtype), rows, head, out=block)
            else:
                torch.mm(rows, head, out=block)
                if self.scale is not None:
                    block.mul_(self.scale[begin:end])
                if bias is not None:
                    block.add_(bias)
            if taught is not None:
                target.index_copy_(0, taught, block)
            elif aside:
                target.copy_(block)

    def add_gradients(
        self, pick: slice | Tensor, grad: Tensor, first: bool, to_hidden: Tensor, to_weight: Tensor, to_bias: Tensor
    ) -> None:
        """From the gradient of the logits, `grad` [n, C], rows of `to_hidden` and what it adds to the others.

        Each of them is empty where it is not wanted; `first` overwrites in place of adding.
        """
        rows = self.rows(pick, grad.dtype)
        grad_rows = rows.new_empty(rows.shape, dtype=ops.accumulation_dtype(grad))
        for begin, end in self.blocks(len(self.weight), grad.dtype):
            block = grad[:, begin:end]
            if to_hidden.numel() > 0:
                _add_product(grad_rows, block, self.classes(begin, end, grad.dtype), begin == 0)
            if to_weight.numel() > 0:
                _add_product(to_weight[begin:end], block.t(), rows, first)
            if to_bias.numel() > 0:
                total = block.sum(0, dtype=to_bias.dtype)
                to_bias[begin:end] = total if first else to_bias[begin:end] + total
        if to_hidden.numel() > 0:
            to_hidden[pick] = grad_rows.to(to_hidden.dtype)


class _Scratch:
    """Buffers by name, made once and used by every chunk."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def __call__(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        size = math.prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            buffer = self._buffers[name, dtype] = torch.empty(size, dtype=dtype, device=self._device)
        return buffer[:size].view(shape)


@torch.no_grad()
def _compute(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Sequence[Tensor],
    teacher_weight: Sequence[Tensor],
    teacher_scale: Sequence[Tensor | None],
    teacher_bias: Sequence[Tensor | None],
    labels: Tensor | None,
    teacher_prior: Tensor | None,
    teacher_mask: Tensor | None,
    sample_weight: Tensor | None,
    num_items: Tensor | None,
    temperature: float,
    weighting: str,
    weight_temperature: float,
    kd_weight: float,
    ce_weight: float,
    label_smoothing: float,
    ignore_index: int,
    unlabeled_index: int,
    reduction: str,
    grad_loss: Tensor | None,
    chunk_rows: int | None,
    need_grad_hidden: bool,
    need_grad_weight: bool,
    need_grad_bias: bool,
    need_stats: bool,
    backend: str | None,
) -> Outputs:
    device = student_hidden.device
    n_rows, n_classes, n_teachers = len(student_hidden), len(student_weight), len(teacher_hidden)
    scratch = _Scratch(device)
    student = _Head(student_hidden, student_weight, None, student_bias, n_classes, scratch)
    teachers = [
        _Head(hidden, weight, scale, bias, n_classes, scratch)
        for hidden, weight, scale, bias in zip(
            teacher_hidden,
            teacher_weight,
            teacher_scale or [None] * n_teachers,
            teacher_bias or [None] * n_teachers,
            strict=True,
        )
    ]
    need_grad = need_grad_hidden or need_grad_weight or need_grad_bias
    empty = [head.hidden.new_empty(0, n_classes, dtype=head.dtype) for head in (student, *teachers)]
    # What the backend is asked, less the chunk.
    call = ops.Arguments(
        empty[0],
        empty[1:],
        [],
        [],
        labels,
        teacher_prior,
        teacher_mask,
        sample_weight,
        num_items,
        temperature,
        weighting,
        weight_temperature,
        kd_weight,
        ce_weight,
        label_smoothing,
        ignore_index,
        unlabeled_index,
        reduction,
        need_grad,
        need_stats,
    )
    module = ops.choose_backend(backend, call.student_logits, call.teacher_logits)
    if ops.values_are_free(student_hidden):
        # Here and not by the backend: it sees chunks, and would name a row of the chunk.
        ops.check_values(call)

    # On an accelerator this waits for the device: how many rows are left has to be known here.
    kept = None if labels is None else (labels != ignore_index).nonzero().squeeze(1)
    n_kept = n_rows if kept is None else len(kept)
    if n_kept == n_rows:
        kept = None
    if reduction == "mean" and num_items is None:
        call = call._replace(num_items=torch.full((), max(1, n_kept), dtype=torch.float64, device=device))
    if chunk_rows is None:
        chunk_rows = default_chunk_rows(n_kept, n_classes, n_teachers, student.dtype.itemsize, device)
    # Classes beyond the last one fill rows up, -inf to everybody. Smoothed labels would have mass there.
    unit = 1 if ce_weight > 0 and label_smoothing > 0 else _sizes(device).classes
    row_length = unit * math.ceil(n_classes / unit)
    if labels is not None and row_length > n_classes:
        # No label may be taken for one of them.
        known = (labels < n_classes) | (labels == ignore_index) | (labels == unlabeled_index)
        labels = labels.where(known, _NO_CLASS)

    outputs = _new_outputs(
        student_hidden, student_weight, n_teachers, reduction, need_grad_hidden, need_grad_weight, need_grad_bias,
        need_stats,
    )  # fmt: skip
    loss, grad_hidden, grad_weight, grad_bias, *stats = outputs
    loss.zero_()
    if kept is not None or n_kept == 0:
        for output in (grad_hidden, *stats):
            output.zero_()
    if n_kept == 0:
        grad_weight.zero_()
        grad_bias.zero_()

    if teacher_prior is not None:
        teacher_prior = teacher_prior.reshape(n_teachers, -1).expand(-1, n_rows)
    for begin in range(0, n_kept, chunk_rows):
        end = min(begin + chunk_rows, n_kept)
        pick = slice(begin, end) if kept is None else kept[begin:end]
        chunk = call._replace(
            student_logits=scratch("student", student.dtype, end - begin, row_length),
            labels=_take(labels, pick),
            teacher_prior=_take(teacher_prior, pick),
            teacher_mask=_take(teacher_mask, pick),
            sample_weight=_take(sample_weight, pick),
        )
        student.write_logits(pick, None, chunk.student_logits)
        teacher_logits = [chunk.student_logits] * n_teachers
        if kd_weight > 0 or need_stats:
            for k, teacher in enumerate(teachers):
                teacher_logits[k] = scratch(f"teacher {k}", teacher.dtype, end - begin, row_length)
                taught = _taught(k, chunk.teacher_prior, chunk.teacher_mask)
                if taught is None or len(taught) > 0:
                    teacher.write_logits(pick, taught, teacher_logits[k])
        chunk_loss, grad, *chunk_stats = module.amtss_loss(chunk._replace(teacher_logits=teacher_logits))
        if reduction == "none":
            loss[pick] = chunk_loss
        else:
            loss.add_(chunk_loss)
        if need_stats:
            for stat, chunk_stat in zip(stats, chunk_stats, strict=True):
                stat[..., pick] = chunk_stat
        if need_grad:
            if grad_loss is not None:
                grad *= grad_loss[pick].unsqueeze(-1)
            student.add_gradients(pick, grad, begin == 0, grad_hidden, grad_weight, grad_bias)
        # Before the next chunk makes its own.
        del grad
    return outputs


def _take(tensor: Tensor | None, pick: slice | Tensor) -> Tensor | None:
    return None if tensor is None else tensor[..., pick]


def _taught(k: int, prior: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """The rows of a chunk that teacher `k` teaches, from what says so [K, n]; None: all of them."""
    teaches = [] if mask is None else [mask[k]]
    if prior is not None:
        teaches.append(prior[k] > 0)
    # On an accelerator knowing would mean waiting for it.
    if not teaches or teaches[0].device.type != "cpu":
        return None
    everywhere = torch.stack(teaches).all(0)
    return None if everywhere.all() else everywhere.nonzero().squeeze(1)


def _new_outputs(
    student_hidden: Tensor,
    student_weight: Tensor,
    n_teachers: int,
    reduction: str,
    need_grad_hidden: bool,
    need_grad_weight: bool,
    need_grad_bias: bool,
    need_stats: bool,
) -> Outputs:
    n_rows, n_classes = student_hidden.shape[0], student_weight.shape[0]
    dtype = ops.accumulation_dtype(student_hidden)
    new = student_hidden.new_empty
    per_teacher = (n_teachers, n_rows) if need_stats else (0,)
    return (
        new(n_rows if reduction == "none" else (), dtype=dtype),
        new(student_hidden.shape if need_grad_hidden else (0,), dtype=ops.gradient_dtype(student_hidden)),
        new(student_weight.shape if need_grad_weight else (0,), dtype=dtype),
        new(n_classes if need_grad_bias else 0, dtype=dtype),
        new(per_teacher, dtype=dtype),
        new(per_teacher, dtype=dtype),
        new(per_teacher, dtype=dtype),
        new(n_rows if need_stats else 0, dtype=dtype),
    )


def _linear_amtss_loss(student_hidden: Tensor, *arguments: Any) -> Outputs:
    # The dtypes of the products are settled here, under autocast too.
    with torch.autocast(student_hidden.device.type, enabled=False):
        return _compute(student_hidden, *arguments)


def _linear_amtss_loss_fake(*arguments: Any) -> Outputs:
    student_hidden, student_weight, _, teacher_hidden, *_ = arguments
    *_, reduction, _grad_loss, _chunk_rows, on_hidden, on_weight, on_bias, need_stats, _backend = arguments
    return _new_outputs(
        student_hidden, student_weight, len(teacher_hidden), reduction, on_hidden, on_weight, on_bias, need_stats
    )


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
    def forward(ctx: Any, needs: tuple[bool, bool, bool], args: Any, *student: Tensor | None) -> tuple[Tensor, ...]:
        teachers, rows, options, chunk_rows, need_stats, backend = args
        ctx.per_row = options[-1] == "none"
        now = (False, False, False) if ctx.per_row else needs
        loss, *outputs = torch.ops.amtss_fast.linear_amtss_loss(
            *student, *teachers, *rows, *options, None, chunk_rows, *now, need_stats, backend
        )
        grads, stats = outputs[:3], outputs[3:]
        ctx.needs = needs
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in student]
        if ctx.per_row:
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
                ops.scale_saved_gradient(grad, grad_loss, dtype) if need else None
                for grad, dtype, need in zip(saved, ctx.dtypes, ctx.needs, strict=True)
            ]
        return None, None, *grads


def run(
    student: tuple[Tensor, Tensor, Tensor | None],
    teachers: Sequence[Sequence[Tensor | None]],
    rows: Sequence[Tensor | None],
    options: Sequence[Any],
    *,
    chunk_rows: int | None,
    need_stats: bool,
    backend: str | None,
) -> tuple[Tensor, ...]:
    """The loss, and with `need_stats` the four stats.

    `student`: hidden states, head, bias. `teachers`: lists of hidden states, heads, scales, biases. `rows`: the
    operator's arguments from `labels` to `num_items`. `options`: those from `temperature` to `reduction`.
    """
    needs = tuple(tensor is not None and tensor.requires_grad for tensor in student)
    if torch.is_grad_enabled() and any(needs):
        outputs: tuple[Tensor, ...] = _LinearAMTSSLoss.apply(
            needs, (teachers, rows, options, chunk_rows, need_stats, backend), *student
        )
        return outputs
    loss, _, _, _, *stats = torch.ops.amtss_fast.linear_amtss_loss(
        *student, *teachers, *rows, *options, None, chunk_rows, False, False, False, need_stats, backend
    )
    return (loss, *stats) if need_stats else (loss,)
