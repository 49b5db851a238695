"""The C++ kernels of 8-bit teachers, called with tensors: a linear layer of codes, and attention."""

from __future__ import annotations

import torch
from torch import Tensor

from amtss_fast.loss.backends import cpu

if cpu.why_missing() is None:
    import amtss_fast._cpu as _cpu


def has_int8() -> bool:
    """Whether `int8_linear` and `attention` run here: AVX-512 with VNNI, unless AMTSS_CPU_ISA names less."""
    return cpu.why_missing() is None and cpu.instruction_set() == "avx512" and bool(_cpu.int8_supported())


def int8_linear(
    x: Tensor, packed: Tensor, offset: Tensor, scale: Tensor, bias: Tensor | None, gelu: bool = False
) -> Tensor:
    """A linear layer of 8-bit codes of x and of weights: x [..., in] in float32 to [..., out].

    Args:
        packed: int8 codes [out / 32, in / 4, 32, 4], both rounded up and padded with zeros.
        offset: int32 [out], minus the sum of an output's codes.
        scale: float32 [out].
        bias: float32 [out].
        gelu: y P(X < y) for a standard normal X in place of y.
    """
    x = x.float().contiguous()
    inputs, outputs = x.shape[-1], len(scale)
    y = torch.empty(*x.shape[:-1], outputs)
    _cpu.int8_linear(
        x.numel() // inputs,
        inputs,
        outputs,
        x.data_ptr(),
        packed.data_ptr(),
        offset.data_ptr(),
        scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        gelu,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q k' where mask) v: float32 [N, H, Q, D], [N, H, K, D] twice, D a multiple of 32, to [N, Q, H, D].

    `mask`: bool, of a shape that expands to [N, H, Q, K]. A query whose keys are all masked gets zeros. The last
    dimension of each tensor is contiguous.
    """
    (n, heads, queries, width), keys = q.shape, k.shape[2]
    tensors = [number for t in (q, k, v) for number in (t.data_ptr(), *t.stride()[:3])]
    if mask is None:
        tensors += (0, 0, 0, 0)
    else:
        mask = mask.expand(n, heads, queries, keys)
        tensors += (mask.data_ptr(), *mask.stride()[:3])
    out = torch.empty(n, queries, heads, width)
    _cpu.attention(n, heads, queries, keys, width, tensors, scale, out.data_ptr(), torch.get_num_threads())
    return out
