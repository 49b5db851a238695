"""A model's head in blocks: logits of some rows from their hidden states, and the gradients of both."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from amtss_fast.loss.contract import accumulation_dtype


class Sizes(NamedTuple):
    """Sizes that are efficient on a device."""

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


_CPU = Sizes(128 << 20, 64, 16, 4096, 1)
_ACCELERATOR = Sizes(1 << 30, 128, 128, 32768, 16)


def sizes_of(device: torch.device) -> Sizes:
    """The sizes for a device."""
    return _CPU if device.type == "cpu" else _ACCELERATOR


def default_chunk_rows(n_rows: int, n_classes: int, n_teachers: int, itemsize: int, device: torch.device) -> int:
    """How many rows a chunk has; all chunks have about the same number. `n_teachers` is what a row has at most."""
    sizes = sizes_of(device)
    row_bytes = (n_teachers + 2) * n_classes * itemsize
    most = max(sizes.least_rows, sizes.chunk_bytes // row_bytes // sizes.rows * sizes.rows)
    n_chunks = max(1, math.ceil(n_rows / most))
    return sizes.rows * math.ceil(max(1, n_rows) / n_chunks / sizes.rows)


def padded_classes(n_classes: int, device: torch.device) -> int:
    """The length of a row of logits; it is filled up with classes that are -inf for every model."""
    unit = sizes_of(device).classes
    return unit * math.ceil(n_classes / unit)


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


class Scaling(NamedTuple):
    """What a model does to its logits z: softcap * tanh(scale * z / softcap), or scale * z under an infinite cap."""

    scale: float
    softcap: float

    def apply(self, logits: Tensor) -> None:
        """Changes `logits` in place."""
        capped = self.softcap < math.inf
        factor = self.scale / self.softcap if capped else self.scale
        if factor != 1:
            logits.mul_(factor)
        if capped:
            logits.tanh_().mul_(self.softcap)

    def apply_to_gradient(self, grad: Tensor, logits: Tensor) -> None:
        """Makes the gradient of the scaled `logits` that of the unscaled ones, in place; `logits` are overwritten."""
        if self.softcap < math.inf:
            # The derivative of tanh, 1 - (logit / softcap)², rounded once.
            one = logits.new_ones(())
            torch.addcmul(one, logits, logits, value=-(self.softcap**-2), out=logits)
            grad.mul_(logits)
        if self.scale != 1:
            grad.mul_(self.scale)


@dataclass
class Head:
    """One model's logits over the student's classes, hidden weight^T + bias, scaled, and how they are computed."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [C', H], floating or, with `code_scale`, int8
    code_scale: Tensor | None  # [C']
    bias: Tensor | None  # [C']
    scaling: Scaling
    n_classes: int  # of the student
    scratch: Callable[[str, torch.dtype, int, int], Tensor]

    def __post_init__(self) -> None:
        # Products of half precision are slow on CPUs. On an accelerator the hidden states set the dtype.
        self.on_cpu = self.hidden.device.type == "cpu"
        self.dtype = accumulation_dtype(self.hidden) if self.on_cpu else self.hidden.dtype

    def rows(self, pick: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """The hidden states of these rows, [n, H]."""
        return self.hidden[pick].to(dtype).contiguous()

    def blocks(self, n_classes: int, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
        """Begin and end of the head's blocks in products of `dtype`.

        On an accelerator all that needs no conversion is one block, and the classes that fill no unit are another: with
        them libraries choose kernels for any alignment, which take three times as long.
        """
        sizes = sizes_of(self.hidden.device)
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

    def write_logits(self, pick: slice | Tensor, out: Tensor) -> None:
        """Fill `out` [n, C or more] with the logits of these rows.

        Classes that this model lacks are -inf, classes that only it has are left out.
        """
        if len(out) == 0:
            return
        n_classes = min(len(self.weight), self.n_classes)
        out[:, n_classes:].fill_(-math.inf)
        rows = self.rows(pick, self.dtype)
        for begin, end in self.blocks(n_classes, self.dtype):
            target = out[:, begin:end]
            # CPU libraries are so much faster with the rows side by side in memory that a copy pays off.
            block = self.scratch("block", self.dtype, end - begin, len(rows)).t() if self.on_cpu else target
            head = self.classes(begin, end, self.dtype).t()
            bias = None if self.bias is None else self.bias[begin:end]
            if bias is not None and self.code_scale is None:
                torch.addmm(bias.to(self.dtype), rows, head, out=block)
            else:
                torch.mm(rows, head, out=block)
                if self.code_scale is not None:
                    block.mul_(self.code_scale[begin:end])
                if bias is not None:
                    block.add_(bias)
            self.scaling.apply(block)
            if self.on_cpu:
                target.copy_(block)

    def add_gradients(
        self,
        pick: slice | Tensor,
        grad: Tensor,
        logits: Tensor,
        first: bool,
        to_hidden: Tensor,
        to_weight: Tensor,
        to_bias: Tensor,
    ) -> None:
        """Computes the gradients of these rows from that of their logits, `grad` [n, C]; it overwrites both.

        Writes the rows of `to_hidden` and adds to `to_weight` and `to_bias`.

        Each of the three is empty where it is not needed; `first` overwrites in place of adding.
        """
        rows = self.rows(pick, grad.dtype)
        grad_rows = rows.new_empty(rows.shape, dtype=accumulation_dtype(grad))
        for begin, end in self.blocks(len(self.weight), grad.dtype):
            block = grad[:, begin:end]
            self.scaling.apply_to_gradient(block, logits[:, begin:end])
            if to_hidden.numel() > 0:
                _add_product(grad_rows, block, self.classes(begin, end, grad.dtype), begin == 0)
            if to_weight.numel() > 0:
                _add_product(to_weight[begin:end], block.t(), rows, first)
            if to_bias.numel() > 0:
                total = block.sum(0, dtype=to_bias.dtype)
                to_bias[begin:end] = total if first else to_bias[begin:end] + total
        if to_hidden.numel() > 0:
            to_hidden[pick] = grad_rows.to(to_hidden.dtype)


class Scratch:
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
