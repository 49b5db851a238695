"""The loss in fused Triton kernels, for CUDA and ROCm.

Importable without Triton, so that `why_missing` can say so.
"""

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

if importlib.util.find_spec("triton") is not None:
    from .launch import amtss_loss, interpreted
    from .scale import scale_gradient

__all__ = ["CHECKS_VALUES", "amtss_loss", "scale_gradient", "why_missing", "why_not"]

CHECKS_VALUES = False
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def why_missing() -> str | None:
    """Triton and a GPU are needed; or Triton's interpreter, on request."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if torch.cuda.is_available() or interpreted():
        return None
    return "there is no CUDA or ROCm device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"


def why_not(student_logits: Tensor, teacher_logits: Sequence[Tensor]) -> str | None:
    """The reason why these tensors cannot be run, or None."""
    if not student_logits.is_cuda and not (interpreted() and student_logits.device.type == "cpu"):
        return f"they are on {student_logits.device}, the kernels need a CUDA or ROCm device"
    if student_logits.dtype not in _FLOATS:
        return f"student_logits is {student_logits.dtype}, allowed are float32, bfloat16 and float16"
    for k, teacher in enumerate(teacher_logits):
        if teacher.dtype not in (*_FLOATS, torch.uint8):
            return f"teacher_logits[{k}] is {teacher.dtype}, allowed are float32, bfloat16, float16 and 8-bit codes"
    return None
