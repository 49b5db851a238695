"""The native CPU backend: hands the addresses of tensors to the C++ kernel `amtss_fast._cpu`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from amtss_fast.ops import Arguments, Outputs, gradient_dtype, raise_label, raise_weight

_MISSING: str | None = None
try:
    import amtss_fast._cpu as _cpu
except ImportError as error:
    _MISSING = f"the compiled module amtss_fast._cpu cannot be imported ({error}); install with a C++ compiler"
else:
    # An environment variable that names what the machine lacks is an error here, not a reason for another backend.
    _cpu.instruction_set()

CHECKS_VALUES = True

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
_WEIGHTINGS = {"label_margin": 0, "top2_margin": 1, "label_nll": 2}
_MAX_TEACHERS = 256
_MAX_CLASSES = 2**31 - 1
_TEMPERATURES = (1e-30, 1e30)


def why_missing() -> str | None:
    """Why this machine cannot run the backend; None if it can."""
    return _MISSING


def release_memory() -> None:
    """Hands the memory kept for the next large gradient back to the system."""
    if _MISSING is None:
        _cpu.release_memory()


def instruction_set() -> str:
    """The instruction set in use: the best of the machine, or what AMTSS_CPU_ISA names."""
    return str(_cpu.instruction_set())


def why_not(student_logits: Tensor, teacher_logits: Sequence[Tensor]) -> str | None:
    """Why the backend cannot run these tensors; None if it can."""
    if student_logits.device.type != "cpu":
        return f"it runs CPU tensors, student_logits are on {student_logits.device}"
    if student_logits.dtype not in _TYPES:
        return f"student_logits are {student_logits.dtype}; it knows float32, bfloat16 and float16"
    if student_logits.shape[1] > _MAX_CLASSES:
        return f"there are {student_logits.shape[1]} classes; it takes up to {_MAX_CLASSES}"
    if len(teacher_logits) > _MAX_TEACHERS:
        return f"there are {len(teacher_logits)} teachers; it takes up to {_MAX_TEACHERS}"
    for k, teacher in enumerate(teacher_logits):
        if teacher.dtype not in _TYPES:
            return f"teacher_logits[{k}] is {teacher.dtype}; it knows float32, bfloat16, float16 and 8-bit codes"
    return None


def amtss_loss(given: Arguments) -> Outputs:
    """Loss, gradient and stats; see the schema in :mod:`amtss_fast.ops`."""
    if not _TEMPERATURES[0] <= given.temperature <= _TEMPERATURES[1]:
        raise ValueError(f"temperature must be in {list(_TEMPERATURES)} for the native kernel, got {given.temperature}")
    student, n_teachers = given.student_logits, len(given.teacher_logits)
    n_rows, n_classes = student.shape
    # Copies that a stride or a dtype makes necessary have to outlive the call.
    alive = []

    def address(tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> int:
        if tensor is None:
            return 0
        if tensor.dtype is not dtype or not tensor.is_contiguous():
            tensor = tensor.to(dtype).contiguous()
            alive.append(tensor)
        return tensor.data_ptr()

    matrices = [student.data_ptr(), *student.stride(), _TYPES[student.dtype], 0, 0]
    for k, teacher in enumerate(given.teacher_logits):
        matrices += (teacher.data_ptr(), *teacher.stride(), _TYPES[teacher.dtype])
        if given.teacher_row_max:
            matrices += (address(given.teacher_row_max[k]), address(given.teacher_step[k]))
        else:
            matrices += (0, 0)

    divisor = 1.0
    if given.num_items is not None:
        divisor = given.num_items.item()
        if not 0 < divisor < float("inf"):
            raise ValueError(f"num_items must be positive and finite, got {divisor}")
    elif given.reduction == "mean":
        # The kernel counts the rows.
        divisor = float("nan")

    per_row = given.reduction == "none"
    loss = torch.empty(n_rows if per_row else ())
    grad_type = gradient_dtype(student)
    if given.need_grad and n_rows * n_classes * grad_type.itemsize >= _cpu.large_gradient:
        # Not torch's memory: fresh pages would take longer than the loss.
        grad = _cpu.gradient(n_rows, n_classes, _TYPES[grad_type])
    else:
        grad = torch.empty((n_rows, n_classes) if given.need_grad else 0, dtype=grad_type)
    stats = [torch.empty(n_teachers, n_rows) for _ in range(3)] + [torch.empty(n_rows)] if given.need_stats else []

    fault = _cpu.loss(
        n_rows,
        n_classes,
        matrices,
        address(given.labels, torch.int64),
        address(given.teacher_prior),
        given.teacher_prior is not None and given.teacher_prior.dim() == 2,
        address(given.teacher_mask, torch.bool),
        address(given.sample_weight),
        given.temperature,
        given.weight_temperature,
        given.kd_weight,
        given.ce_weight,
        given.label_smoothing,
        _WEIGHTINGS[given.weighting],
        given.ignore_index,
        given.unlabeled_index,
        divisor,
        grad.data_ptr() if given.need_grad else 0,
        _TYPES[grad_type],
        loss.data_ptr() if per_row else 0,
        *([stat.data_ptr() for stat in stats] or (0, 0, 0, 0)),
        0 if per_row else loss.data_ptr(),
        torch.get_num_threads(),
    )
    if fault is not None:
        which, index = fault
        if which == 1 and given.labels is not None:
            raise_label(int(given.labels[index]), index, n_classes, given.ignore_index, given.unlabeled_index)
        name, weight = ("teacher_prior", given.teacher_prior) if which == 2 else ("sample_weight", given.sample_weight)
        assert weight is not None
        raise_weight(name, float(weight.flatten()[index]))
    return loss, grad, *stats


def has_int8() -> bool:
    """Whether `int8_linear` and `attention` run here: AVX-512 with VNNI, unless AMTSS_CPU_ISA names less."""
    return instruction_set() == "avx512" and bool(_cpu.int8_supported())


def int8_linear(
    x: Tensor, packed: Tensor, offset: Tensor, scale: Tensor, bias: Tensor | None, gelu: bool = False
) -> Tensor:
    """A linear layer of 8-bit codes of x and of weights: x [..., in] in float32 to [..., out].

    Args:
        packed: int8 codes [out / 32, in / 4, 32, 4], both rounded up, zeros in what is added.
        offset: int32 [out], minus the sum of an output's codes.
        scale: float32 [out]. bias: float32 [out].
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
    dimension of each lies side by side.
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
