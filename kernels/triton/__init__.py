"""The loss in fused Triton kernels, for CUDA and ROCm.

This module satisfies the protocol :class:`amtss_fast.loss.contract.Backend`. It can be imported without Triton;
`why_missing` then says so.
"""

from __future__ import annotations

import importlib.util

import torch

from amtss_fast.loss.contract import LossInputs
from amtss_fast.loss.options import LossOptions

if importlib.util.find_spec("triton") is not None:
    from .binary import interpreted
    from .launch import amtss_loss
    from .lists import LONGEST_LIST
    from .scale import scale_gradient

__all__ = ["CHECKS_VALUES", "amtss_loss", "scale_gradient", "why_missing", "why_not"]

CHECKS_VALUES = False
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def why_missing() -> str | None:
    """Why this machine cannot run the backend; None if it can. Triton's interpreter stands in for a GPU on request."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if torch.cuda.is_available() or interpreted():
        return None
    return "there is no CUDA or ROCm device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"


def why_not(inputs: LossInputs, options: LossOptions) -> str | None:
    """Why the backend cannot run this call; None if it can."""
    student_logits, teacher_logits = inputs.student_logits, inputs.teacher_logits
    if not student_logits.is_cuda and not (interpreted() and student_logits.device.type == "cpu"):
        return f"they are on {student_logits.device}, the kernels need a CUDA or ROCm device"
    if student_logits.dtype not in _FLOATS:
        return f"student_logits is {student_logits.dtype}, allowed are float32, bfloat16 and float16"
    for k, indices in enumerate(inputs.teacher_indices):
        if indices is not None and indices.shape[1] > LONGEST_LIST:
            return f"teacher_logits[{k}] lists {indices.shape[1]} classes of a row, allowed are {LONGEST_LIST}"
    for k, teacher in enumerate(teacher_logits):
        if teacher.dtype not in (*_FLOATS, torch.uint8):
            return f"teacher_logits[{k}] is {teacher.dtype}, allowed are float32, bfloat16, float16 and 8-bit codes"
    return None
