"""The backward pass: multiplies the saved gradient by the gradient of the loss, in place, unless that is 1."""

from __future__ import annotations

import torch
from torch import Tensor

from .binary import binaries, multiprocessors
from .device.scale import multiply

_LENGTH = 4096
# Programs of a multiprocessor, as many as fit. More would take time to start, although the factor is often 1.
_PROGRAMS = 4
_multiply = binaries(multiply, 256)


def scale_gradient(grad: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    """See :attr:`amtss_fast.loss.contract.Backend.scale_gradient`; `grad` is contiguous."""
    size, device, skip = grad.numel(), grad.get_device(), out is grad
    programs = min(-(-size // _LENGTH), _PROGRAMS * multiprocessors(device))
    if programs > 0:
        binary = _multiply(device, out.dtype, grad.dtype, factor.dtype, skip)
        with torch.cuda.device_of(grad):
            binary.launch(programs, (out, grad, factor, size, skip, _LENGTH))
    return out
