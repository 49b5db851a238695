"""The backward pass: the saved gradient times the gradient of the loss, in place, and nothing where that is 1."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from amtss_fast._triton.common import kernel
from amtss_fast._triton.launch import device_kind


@kernel
def multiply(out, x, factor, n_elements: tl.int64, SKIP: tl.constexpr, LENGTH: tl.constexpr):
    scale = tl.load(factor).to(tl.float32)
    index = tl.program_id(0).to(tl.int64) * LENGTH + tl.arange(0, LENGTH)
    # Decided on the device: on the host it would have to wait for the number.
    if SKIP:
        n_elements = tl.where(scale == 1.0, 0, n_elements)
    wanted = index < n_elements
    y = tl.load(x + index, wanted, other=0).to(tl.float32) * scale
    tl.store(out + index, y.to(out.dtype.element_ty), wanted)


def scale_gradient(grad: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    """Contiguous `grad` times the 0-d `factor`, written to `out`, which may be `grad`."""
    length, threads = 2048, 256
    with torch.cuda.device_of(grad):
        multiply[(triton.cdiv(grad.numel(), length),)](
            out, grad, factor, grad.numel(), SKIP=out is grad, LENGTH=length, num_warps=threads // device_kind()[0]
        )
    return out
