"""The backward pass: the saved gradient times the gradient of the loss, in place, and nothing where that is 1."""

from functools import cache

import torch
from torch import Tensor

import triton.language as tl

from .common import kernel
from .launch import binaries

_LENGTH = 4096
# As many fit on a multiprocessor. More programs than fit would all have to be started, to find that the factor is 1.
_PROGRAMS = 4


@kernel
def multiply(out, x, factor, n_elements: tl.int64, SKIP: tl.constexpr, LENGTH: tl.constexpr):
    scale = tl.load(factor).to(tl.float32)
    # Decided on the device: on the host it would have to wait for the number.
    if SKIP:
        n_elements = tl.where(scale == 1.0, 0, n_elements)
    begin = tl.program_id(0).to(tl.int64) * LENGTH
    for start in range(begin, n_elements, tl.num_programs(0) * LENGTH):
        index = start + tl.arange(0, LENGTH)
        wanted = index < n_elements
        y = tl.load(x + index, wanted, other=0).to(tl.float32) * scale
        tl.store(out + index, y.to(out.dtype.element_ty), wanted)


_multiply = binaries(multiply, 256)


@cache
def multiprocessors(device: int) -> int:
    # Triton's interpreter runs one program after the other.
    return 1 if device < 0 else torch.cuda.get_device_properties(device).multi_processor_count


def scale_gradient(grad: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    """Contiguous `grad` times the 0-d `factor`, written to `out`, which may be `grad`."""
    size, device, skip = grad.numel(), grad.get_device(), out is grad
    programs = min(-(-size // _LENGTH), _PROGRAMS * multiprocessors(device))
    if programs > 0:
        binary = _multiply(device, out.dtype, grad.dtype, factor.dtype, skip)
        with torch.cuda.device_of(grad):
            binary.launch(programs, (out, grad, factor, size, skip, _LENGTH))
    return out
