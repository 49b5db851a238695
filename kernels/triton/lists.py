"""Top-k lists in the form that `device/lists.py` reads, packed by operations that do not wait for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import triton
from amtss_fast.loss.contract import LossInputs

from .binary import Launch
from .teachers import numbers

# A program holds a whole list in registers.
LONGEST_LIST = 4095
# The arguments of a call without lists.
NO_LISTS = dict.fromkeys(("lists", "list_classes", "list_logprobs"))


def has_lists(inputs: LossInputs) -> bool:
    """Whether a teacher lists the log-probabilities of some classes."""
    return any(indices is not None for indices in inputs.teacher_indices)


def without_lists(inputs: LossInputs) -> list[Tensor]:
    """The teachers' logits. In the place of a list are those of another model, which no kernel reads."""
    if not has_lists(inputs):
        return inputs.teacher_logits
    pairs = list(zip(inputs.teacher_logits, inputs.teacher_indices, strict=True))
    other = next((logits for logits, indices in pairs if indices is None), inputs.student_logits)
    return [logits if indices is None else other for logits, indices in pairs]


def pack_lists(inputs: LossInputs, launches: list[Launch]) -> dict[str, Tensor]:
    """The kernels' arguments for lists, of which there is at least one."""
    student = inputs.student_logits
    n_rows, n_classes = student.shape
    pairs = zip(inputs.teacher_logits, inputs.teacher_indices, strict=True)
    given = [(values, indices) for values, indices in pairs if indices is not None]
    longest = max(values.shape[1] for values, _ in given)
    shape = (len(given), n_rows, triton.next_power_of_2(longest + 1))
    classes = student.new_full(shape, n_classes, dtype=torch.int32)
    logprobs = student.new_full(shape, -torch.inf, dtype=torch.float32)
    for k, (values, indices) in enumerate(given):
        ordered, order = indices.where(values != -torch.inf, n_classes).sort(-1)
        n_own, length = ordered.shape
        classes[k, :n_own, :length] = ordered
        logprobs[k, :n_own, :length] = values.gather(-1, order)
    table = numbers([*_numbers_of_lists(inputs.teacher_indices), *map(float, inputs.teacher_bucket)], student, launches)
    return {"lists": table, "list_classes": classes, "list_logprobs": logprobs}


def _numbers_of_lists(teacher_indices: Sequence[Tensor | None]) -> list[int]:
    """-1 for a teacher of logits."""
    found, out = 0, []
    for indices in teacher_indices:
        out.append(-1 if indices is None else found)
        found += indices is not None
    return out
