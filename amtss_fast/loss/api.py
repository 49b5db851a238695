"""The public loss: `amtss_loss` and its module form `AMTSSLoss`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, cast

from torch import Tensor, nn
from typing_extensions import Unpack

from amtss_fast.loss import ops
from amtss_fast.loss.checks import (
    as_num_items,
    check_logits,
    check_quantized,
    check_rows,
    check_special_labels,
    check_tails,
    check_top_k,
    unpack_teacher_rows,
)
from amtss_fast.loss.contract import LossInputs
from amtss_fast.loss.logits import QuantizedLogits, TopKLogprobs
from amtss_fast.loss.options import LossKeywords, make_options, shows_options

TeacherLogits: TypeAlias = Tensor | QuantizedLogits | TopKLogprobs | Sequence[Tensor | QuantizedLogits | TopKLogprobs]


@shows_options
def amtss_loss(
    student_logits: Tensor,
    teacher_logits: TeacherLogits,
    labels: Tensor | None = None,
    *,
    teacher_rows: Sequence[Tensor | None] | None = None,
    teacher_prior: Tensor | None = None,
    teacher_mask: Tensor | None = None,
    sample_weight: Tensor | None = None,
    num_items: int | float | Tensor | None = None,
    return_stats: bool = False,
    backend: str | None = None,
    **options: Unpack[LossKeywords],
) -> Any:
    r"""Distil K teachers into one student, each row from its max-margin teachers.

    For each row, with :math:`q = \mathrm{softmax}(s/\tau)` and :math:`p_k = \mathrm{softmax}(t_k/\tau)`::

        m_k = p_k[y] - max over c != y of p_k[c]          weighting="label_margin"
            = p_k[largest] - p_k[second largest]          weighting="top2_margin"
            = log p_k[y]                                  weighting="label_nll"
        w_k = alpha_k exp(m_k / beta) / sum_j alpha_j exp(m_j / beta)
        KD  = tau² sum_k w_k D(p_k, q)                    divergence="forward_kl": KL(p_k || q)
        CE  = cross entropy of softmax(s) with y, label-smoothed
        loss of the row = sample_weight (kd_weight KD + ce_weight CE)

    Teachers and weights carry no gradient; the gradient of the student's logits is computed in the same pass.

    The divergence D is one of six, with b = divergence_beta (convention of)::

        forward_kl       sum p (log p - log q)
        reverse_kl       sum q (log q - log p)                                  TRL and Liger: beta = 1
        jsd              b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q  TRL and Liger: beta = b
        skew_forward_kl  KL(p || m), m = b p + (1 - b) q                        DistiLLM
        skew_reverse_kl  KL(q || m), m = b q + (1 - b) p                        DistiLLM
        tvd              1/2 sum |p - q|                                        Liger

    Args:
        student_logits: [N, C] float32, bfloat16, float16 or float64 (float64: reference backend only); N rows are
            samples or tokens.
        teacher_logits: [K, N, C], or a sequence of K tensors [N, C] (never copied into a stack), or
            :class:`QuantizedLogits` or :class:`TopKLogprobs` in their place. Each may have its own floating dtype.
        labels: [N] int64, or None for a batch without labels.
        temperature: tau in [1e-18, 1e18], of the student, and of the teachers unless they have their own.
        teacher_temperature: of all teachers, or one for each of K: p_k = softmax(t_k / tau_k). None: `temperature`.
        divergence: see above.
        divergence_beta: b in (0, 1). None: 0.5 for "jsd", 0.1 for the skewed ones; the others take none.
        weighting: the margin that weighs the teachers, see above.
        weight_temperature: beta in [0, inf]. 0 gives all weight to the max-margin teacher (the first of equal ones),
            inf ignores the margins.
        teacher_rows: for each teacher the rows [N_k] that its logits are of, int64, ascending and without repetition,
            or None for all N. Teacher k then has logits [N_k, C] and teaches no other row: memory and time depend on
            the rows that are taught. Priors and masks stay [K, N].
        teacher_prior: alpha, [K] or [K, N] float >= 0; 0 takes a teacher out. None: ones.
        teacher_mask: [K, N] bool; False: this teacher does not teach this row, its logits there are unused. None: all
            True.
        sample_weight: r, [N] float >= 0; 0 takes a row out of the sum, but it still counts in the mean. None: ones.
        kd_weight, ce_weight: >= 0, not both 0; a term of weight 0 is not computed. kd_weight tau² must fit a float32.
        label_smoothing: of the cross entropy, in [0, 1).
        ignore_index: rows with this label are dropped: no loss, no gradient, not counted.
        unlabeled_index: rows with this label have no label: in the margins of each teacher y is its own largest class,
            there is no cross entropy, and the row counts.
        reduction: "mean" over the rows that count, "sum", or "none" for the loss of each row, [N].
        num_items: divides the sum in place of the number of rows that count (for gradient accumulation and data
            parallelism); only with reduction="mean". A number or a 0-d tensor.
        return_stats: also return :class:`AMTSSStats`. Their `pull` reads rows that do not fit the caches once more.
        backend: "cpu", "triton", "reference", or None for the best that runs these tensors.

    Returns:
        The loss, 0-d or [N], in float32 (float64 for float64 logits); with `return_stats` also the stats.

    Infinities and NaN: -inf is a masked class (a teacher's adds 0 where the student's is -inf too; a student's -inf
    where a teacher has mass gives a loss of +inf and a finite gradient). With the reverse KL a teacher's -inf where the
    student has mass gives a loss of +inf, and a gradient that may be NaN in that row; jsd, the skewed KLs and tvd are
    always finite. NaN, or a row that is -inf throughout, makes its own row NaN and no other. A row without a teacher
    keeps its cross entropy. Nothing is clamped.

    Raises:
        ValueError, TypeError: wrong rank, shape, dtype or value of an argument, named in the message. Values inside
            tensors are checked on the CPU; on accelerators, where a check waits for the device, only with the
            environment variable AMTSS_DEBUG=1 (otherwise a row with an impossible label is NaN).
        RuntimeError: teachers on another device, or a backend that is missing or cannot run these tensors.

    Source: the idea is that of AMTSS (arXiv 2305.07928), max-margin teachers weighted by importance; its abstract
    fixes no formula, and the ones above are this library's own.
    """
    chosen = make_options(options)
    teachers, row_max, step, indices, bucket = _unpack(teacher_logits)
    rows = unpack_teacher_rows(teacher_rows, len(teachers))
    check_logits(student_logits, teachers, row_max, step, indices, rows)
    n_rows, n_classes = student_logits.shape
    device = student_logits.device
    teacher_prior, sample_weight = check_rows(
        "student_logits", labels, teacher_prior, teacher_mask, sample_weight, n_rows, len(teachers), device
    )
    check_special_labels(chosen, n_classes)
    check_tails("teacher_logits", chosen, len(teachers), bucket)
    inputs = LossInputs(
        student_logits,
        teachers,
        row_max,
        step,
        rows,
        indices,
        bucket,
        labels,
        teacher_prior,
        teacher_mask,
        sample_weight,
        as_num_items(num_items, chosen.reduction, device),
    )
    loss, stats = ops.run(inputs, chosen, need_stats=return_stats, backend=backend)
    return (loss, stats) if return_stats else loss


class AMTSSLoss(nn.Module):
    """:func:`amtss_loss` as a module: the options are given once, the tensors with every call.

    >>> loss_fn = AMTSSLoss(temperature=2.0, ce_weight=0.5)
    >>> loss = loss_fn(student_logits, teacher_logits, labels)

    Args:
        return_stats, backend, and all options: as of :func:`amtss_loss`, checked here.
    """

    @shows_options
    def __init__(
        self, *, return_stats: bool = False, backend: str | None = None, **options: Unpack[LossKeywords]
    ) -> None:
        super().__init__()
        self.options = make_options(options)
        self.return_stats = return_stats
        self.backend = backend

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: TeacherLogits,
        labels: Tensor | None = None,
        *,
        teacher_rows: Sequence[Tensor | None] | None = None,
        teacher_prior: Tensor | None = None,
        teacher_mask: Tensor | None = None,
        sample_weight: Tensor | None = None,
        num_items: int | float | Tensor | None = None,
    ) -> Any:
        """See :func:`amtss_loss`."""
        return amtss_loss(
            student_logits,
            teacher_logits,
            labels,
            teacher_rows=teacher_rows,
            teacher_prior=teacher_prior,
            teacher_mask=teacher_mask,
            sample_weight=sample_weight,
            num_items=num_items,
            return_stats=self.return_stats,
            backend=self.backend,
            **self.options.keywords(),
        )

    def extra_repr(self) -> str:
        shown = {**self.options.keywords(), "return_stats": self.return_stats, "backend": self.backend}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


_Unpacked: TypeAlias = tuple[list[Tensor], list[Tensor | None], list[Tensor | None], list[Tensor | None], list[bool]]


def _unpack(teacher_logits: TeacherLogits) -> _Unpacked:
    """The fields of :class:`LossInputs` from `teacher_logits` to `teacher_bucket`, without `teacher_rows`."""
    if isinstance(teacher_logits, Tensor):
        if teacher_logits.dim() != 3:
            raise ValueError(
                "teacher_logits must be [K, N, C] or a sequence of K tensors [N, C], "
                f"got one tensor of shape {list(teacher_logits.shape)}"
            )
        return list(teacher_logits.unbind(0)), [], [], [], []
    if isinstance(teacher_logits, (QuantizedLogits, TopKLogprobs)):
        teacher_logits = [teacher_logits]
    if not isinstance(teacher_logits, (list, tuple)):
        raise TypeError(
            f"teacher_logits must be a tensor or a sequence of tensors, got {type(teacher_logits).__name__}"
        )
    if all(isinstance(t, Tensor) for t in teacher_logits):
        return list(teacher_logits), [], [], [], []
    logits: list[Tensor] = []
    row_max, step, indices = (cast("list[Tensor | None]", [None] * len(teacher_logits)) for _ in range(3))
    bucket = [False] * len(teacher_logits)
    for k, teacher in enumerate(teacher_logits):
        if isinstance(teacher, QuantizedLogits):
            check_quantized(f"teacher_logits[{k}]", teacher._asdict())
            logits.append(teacher.codes)
            row_max[k], step[k] = teacher.row_max, teacher.step
        elif isinstance(teacher, TopKLogprobs):
            check_top_k(f"teacher_logits[{k}]", teacher)
            logits.append(teacher.logprobs.detach())
            indices[k], bucket[k] = teacher.indices.long(), teacher.tail == "bucket"
        else:
            logits.append(teacher)
    quantized, listed = any(t is not None for t in row_max), any(t is not None for t in indices)
    return (
        logits,
        row_max if quantized else [],
        step if quantized else [],
        indices if listed else [],
        bucket if listed else [],
    )
