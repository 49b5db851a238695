"""From tensors to launches of the kernels."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from amtss_fast.loss.contract import AMTSSStats, LossInputs, LossOutputs, empty_stats, gradient_dtype
from amtss_fast.loss.options import LossOptions

from .binary import Launch, launch_all
from .device.lists import COMPARED
from .device.pairs import STUDENT_CHUNK_PAIRS, STUDENT_PAIRS, TEACHER_CHUNK_PAIRS
from .lists import NO_LISTS, has_lists, pack_lists, without_lists
from .plan import Call, LaunchPlan, describe, make_plan, sums_terms
from .sums import add, count
from .teachers import numbers, places, teacher_arguments

# Programs of one launch that count each other.
MOST_TICKETS = 2**31 - 1
_NO_STATS = dict.fromkeys(AMTSSStats._fields)


def amtss_loss(inputs: LossInputs, options: LossOptions, *, need_grad: bool, need_stats: bool) -> LossOutputs:
    """See :class:`amtss_fast.loss.contract.Backend`. Nothing here waits for the device."""
    with torch.cuda.device_of(inputs.student_logits):
        launches, outputs = prepare(inputs, options, need_grad=need_grad, need_stats=need_stats)
        launch_all(launches)
    return outputs


def prepare(
    inputs: LossInputs, options: LossOptions, *, need_grad: bool, need_stats: bool
) -> tuple[list[Launch], LossOutputs]:
    """The launches that compute the loss, in order, and the outputs that they write."""
    student, n_teachers = inputs.student_logits, len(inputs.teacher_logits)
    n_rows, n_classes = student.shape
    new = student.new_empty
    row_loss = new(n_rows, dtype=torch.float32)
    grad = new((n_rows, n_classes), dtype=gradient_dtype(student)) if need_grad else None
    stats = None
    if need_stats:
        stats = empty_stats(partial(new, dtype=torch.float32), n_teachers, n_rows)
    # A kernel distinguishes labels and counts by their type.
    labels = None if inputs.labels is None else inputs.labels.long().contiguous()
    launches: list[Launch] = []
    divisor = _divisor(inputs, options, labels, launches)
    if n_rows > 0:
        tensors: dict[str, Any] = {
            "student": student,
            "scales": _scales(inputs.teacher_row_max, inputs.teacher_step, n_rows),
            "exponents": _exponents(n_teachers, options, student, launches),
            "places": places(inputs.teacher_rows, n_rows, student, launches),
            "labels": labels,
            "prior": _prior(inputs.teacher_prior, inputs.teacher_mask, n_teachers, n_rows),
            "sample_weight": None if inputs.sample_weight is None else inputs.sample_weight.contiguous(),
            "divisor": divisor,
            "row_loss": row_loss,
            "grad": grad,
            **(_NO_STATS if stats is None else stats._asdict()),
        }
        packs = has_lists(inputs) and _needs_teachers(options, tensors)
        tensors |= pack_lists(inputs, launches) if packs else NO_LISTS
        launches += _row_launches(without_lists(inputs), options, tensors)
    loss = row_loss if options.reduction == "none" else add(row_loss, divisor, options.ignore_index, launches)
    return launches, LossOutputs(loss, grad, stats)


def _divisor(inputs: LossInputs, options: LossOptions, labels: Tensor | None, launches: list[Launch]) -> Tensor | None:
    """What divides a mean, as `device/total.py: read_divisor` takes it; None without a mean."""
    if options.reduction != "mean":
        return None
    if inputs.num_items is not None:
        # Integers would be read as counts.
        return inputs.num_items if inputs.num_items.is_floating_point() else inputs.num_items.double()
    if labels is not None:
        return count(labels, options.ignore_index, launches)
    student = inputs.student_logits
    return student.new_full((), max(student.shape[0], 1), dtype=torch.float32)


def _row_launches(teachers: Sequence[Tensor], options: LossOptions, tensors: dict[str, Any]) -> list[Launch]:
    """The launches that write the loss of each row, the gradient and the stats.

    `tensors`: all others by the names of the kernels' arguments.
    """
    where, launches = teacher_arguments(teachers)
    tensors |= where
    choice = _choice(options.weight_temperature)
    n_rows = tensors["row_loss"].shape[0]
    call = _call(teachers, options, choice, tensors)
    plan = make_plan(call)
    if plan.steps[0].programs(n_rows) > MOST_TICKETS:
        plan = make_plan(call._replace(two_reads=True))
    arguments = plan.constants | tensors | _numbers(len(teachers), options, choice, tensors)
    if plan.chunks > 0:
        arguments |= _between_programs(plan, len(teachers), tensors)
    for step in plan.steps:
        launches.append(step.binary.of(step.programs(n_rows), arguments | step.own))
    return launches


def _choice(weight_temperature: float) -> str:
    """The softmax over teachers, see `margins.admit`. 1 / weight_temperature has to be a normal float32."""
    if weight_temperature < 2.0**-126:
        return "hard"
    return "flat" if weight_temperature >= 2.0**128 else "soft"


def _call(teachers: Sequence[Tensor], options: LossOptions, choice: str, tensors: dict[str, Any]) -> Call:
    student, grad, labels, lists = (tensors[name] for name in ("student", "grad", "labels", "list_classes"))
    return Call(
        student.get_device(),
        student.shape[1],
        describe(student),
        tuple([describe(t) for t in teachers]),
        None if grad is None else describe(grad),
        _type(tensors["teacher_table"]),
        _type(tensors["scales"]),
        _type(tensors["exponents"]),
        _type(tensors["places"]),
        0 if lists is None else lists.shape[-1],
        lists is not None and len(lists) == len(teachers),
        _type(labels),
        _type(tensors["prior"]),
        _type(tensors["sample_weight"]),
        _type(tensors["divisor"]),
        options.weighting,
        choice,
        # Without teachers there is nothing to compare.
        options.divergence if _needs_teachers(options, tensors) else "forward_kl",
        options.ce_weight > 0 and labels is not None,
        tensors["student_margin"] is not None,
        any(os.environ.get(name) == "1" for name in ("AMTSS_TWO_READS", "AMTSS_AUTOTUNE")),
    )


def _type(argument: Tensor | None) -> torch.dtype | None:
    return None if argument is None else argument.dtype


def _numbers(n_teachers: int, options: LossOptions, choice: str, tensors: dict[str, Any]) -> dict[str, Any]:
    """The arguments that are numbers and may differ between calls of one plan."""
    prior, beta = tensors["prior"], options.divergence_beta or 0.0
    mixing = 1 - beta if options.divergence == "skew_reverse_kl" else beta
    return {
        "prior_stride_k": 0 if prior is None else prior.stride(0),
        "prior_stride_n": 0 if prior is None else prior.stride(1),
        "n_rows": tensors["row_loss"].shape[0],
        "n_teachers": n_teachers if _needs_teachers(options, tensors) else 0,
        "ignore_index": options.ignore_index,
        "unlabeled_index": options.unlabeled_index,
        "exponent": _exponent(options.temperature),
        "temperature": options.temperature,
        "mixing": mixing,
        "unmixing": 1 - mixing,
        # Unused by the other choices.
        "sharpness": 1 / options.weight_temperature if choice == "soft" else 1.0,
        "kd_weight": options.kd_weight,
        "ce_weight": options.ce_weight,
        "label_smoothing": options.label_smoothing,
    }


def _needs_teachers(options: LossOptions, tensors: dict[str, Any]) -> bool:
    """Without a distillation term and stats, no teacher is read."""
    return options.kd_weight > 0 or tensors["student_margin"] is not None


def _exponent(temperature: float) -> float:
    return 1 / (temperature * math.log(2))


def _exponents(n_teachers: int, options: LossOptions, like: Tensor, launches: list[Launch]) -> Tensor | None:
    """The exponent of each teacher; None if all are the student's."""
    temperatures = options.teacher_temperatures(n_teachers)
    if all(temperature == options.temperature for temperature in temperatures):
        return None
    return numbers([_exponent(temperature) for temperature in temperatures], like, launches)


def _between_programs(plan: LaunchPlan, n_teachers: int, tensors: dict[str, Any]) -> dict[str, Tensor | None]:
    """Memory for what the programs of `device/stream.py` pass on."""
    row_loss, stats = tensors["row_loss"], tensors["student_margin"] is not None
    n_rows, n_chunks, roles = row_loss.shape[0], plan.chunks, plan.steps[0].roles
    lists = tensors["list_classes"]
    pairs = STUDENT_CHUNK_PAIRS.value + n_teachers * TEACHER_CHUNK_PAIRS.value
    return {
        "fields": row_loss.new_empty((pairs, n_rows, n_chunks, 2)),
        "factors": row_loss.new_empty((STUDENT_PAIRS.value + n_teachers, n_rows, 2)),
        "normalizers": row_loss.new_empty((1 + n_teachers, n_rows, 2)) if plan.normalizes else None,
        "sums": row_loss.new_empty((n_teachers, n_rows, n_chunks, 2)) if sums_terms(plan.divergence) else None,
        "distances": row_loss.new_empty((n_teachers, n_rows, n_chunks)) if stats else None,
        "compared": None if lists is None else row_loss.new_empty((n_teachers, n_rows, COMPARED.value)),
        "list_bits": None if lists is None else row_loss.new_empty(lists.shape),
        "tickets": row_loss.new_zeros(1 + (roles - 1) * n_rows, dtype=torch.int32) if roles > 1 else None,
    }


def _prior(teacher_prior: Tensor | None, teacher_mask: Tensor | None, n_teachers: int, n_rows: int) -> Tensor | None:
    """Prior and mask as one [K, N], 0 where a teacher does not teach a row."""
    if teacher_prior is None:
        return teacher_mask
    prior = teacher_prior.reshape(n_teachers, -1).expand(n_teachers, n_rows)
    return prior if teacher_mask is None else prior.where(teacher_mask, 0)


def _scales(row_max: Sequence[Tensor | None], step: Sequence[Tensor | None], n_rows: int) -> Tensor | None:
    """row_max and step of all teachers, [2, K, N], of a teacher of fewer rows at the front; None without such ones."""
    given = next((t for t in row_max if t is not None), None)
    if given is None:
        return None
    scales = [given.new_zeros(n_rows, dtype=torch.float32) if t is None else t.float() for t in (*row_max, *step)]
    return torch.stack([t if len(t) == n_rows else pad(t, (0, n_rows - len(t))) for t in scales])
