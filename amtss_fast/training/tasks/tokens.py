"""Tasks whose rows are tokens: masked and causal language models, and classifiers of tokens.

Batches hold `input_ids`, `attention_mask` and `labels` [N, T] and `language_ids` [N]. A token counts where its label
says so; language models go through the fused head, so that no logits of a vocabulary are ever held.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from amtss_fast.data.load import DistillationCollator
from amtss_fast.loss import AMTSSStats, amtss_loss, linear_amtss_loss
from amtss_fast.loss.logits import QuantizedWeight
from amtss_fast.loss.options import IGNORE_INDEX, UNLABELED_INDEX
from amtss_fast.models.heads import OutputHead
from amtss_fast.teachers.int8 import Int8Embedding
from amtss_fast.teachers.teacher import Teacher, Teachers

LANGUAGE_MODELS = ("masked-lm", "causal-lm")
TOKEN_TASKS = (*LANGUAGE_MODELS, "token-classification")


def token_targets(task: str, batch: Mapping[str, Any]) -> Tensor:
    """What each position has to predict [N, T], -100 where it counts for nothing: the one place that knows of padding
    and of the shift.

    `labels` are those of the tokens themselves, as transformers has them; a causal model's position t predicts token
    t + 1. Padding (attention_mask 0) neither predicts nor is predicted.
    """
    labels: Tensor = batch["labels"]
    mask = batch.get("attention_mask")
    if labels.shape != batch["input_ids"].shape:
        raise ValueError(
            f"batch['labels'] must have the shape of input_ids {list(batch['input_ids'].shape)} for task {task!r}, got "
            f"{list(labels.shape)}"
        )
    if mask is not None:
        labels = labels.masked_fill(mask == 0, IGNORE_INDEX)
    if task != "causal-lm":
        return labels
    labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    return labels if mask is None else labels.masked_fill(mask == 0, IGNORE_INDEX)


@dataclass
class _Targets:
    """The n positions of a batch that count."""

    index: Tensor
    """[n] places in the flattened [N * T]."""
    labels: Tensor
    """[n]."""
    rows: Tensor
    """[n] the sequence of each."""
    language_ids: Tensor
    """[n]."""

    @classmethod
    def of(cls, task: str, batch: Mapping[str, Any]) -> _Targets:
        targets = token_targets(task, batch)
        index = (targets != IGNORE_INDEX).flatten().nonzero().squeeze(1)
        rows = index // targets.shape[1]
        return cls(index, targets.flatten()[index], rows, batch["language_ids"][rows])


class TokenTeachers(Teachers):
    """Several teachers of a token task beside one student; they read the student's token ids.

    A sequence goes only to the teachers of its language; a teacher without one in the batch is not run.

    Args:
        teachers: K teachers (`load_teacher(..., task=task)`) with different names. Their tokenizer is the student's;
            language models may differ in the padding of their vocabulary.
        task: `"masked-lm"`, `"causal-lm"` or `"token-classification"`.
        languages: the student's languages; `language_ids` are places in it.
        tokenizer: the student's.
        label_names: the student's labels in the order of its logits; for token-classification.

    Raises:
        ValueError: no teacher, a name twice, another tokenizer, labels that do not match, a head that cannot be fused,
            a language that the student lacks.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        *,
        task: str,
        languages: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        label_names: Sequence[str] | None = None,
    ) -> None:
        if task not in TOKEN_TASKS:
            raise ValueError(f"task must be one of {', '.join(TOKEN_TASKS)}; got {task!r}")
        if (label_names is None) != (task in LANGUAGE_MODELS):
            raise ValueError(f"label_names belong to token-classification, got {label_names!r} for task {task!r}")
        super().__init__(teachers, languages, tokenizer)
        self.task = task
        self.label_names = None if label_names is None else list(label_names)
        for teacher, differs in zip(self.teachers, self._reads_text, strict=True):
            if differs:
                raise ValueError(
                    f"teacher {teacher.name!r} has another tokenizer than the student: with task {task!r} all must "
                    "read the same token ids"
                )
        self.heads: list[OutputHead] = []
        self._order: list[list[int]] = []
        if label_names is None:
            self.heads = [OutputHead(t.model, f"teacher {t.name!r}") for t in self.teachers]
            for teacher, head in zip(self.teachers, self.heads, strict=True):
                if isinstance(teacher.model.get_input_embeddings(), Int8Embedding):
                    head.quantize()
        else:
            self._order = [teacher.align(label_names) for teacher in self.teachers]

    @torch.no_grad()
    def outputs(self, batch: Mapping[str, Any], targets: _Targets) -> tuple[list[Tensor], Tensor]:
        """What the teachers say at n positions, and the mask [K, n] of who teaches them.

        Of language models the states that enter their heads, K of [n, H_k] (0 where a teacher does not teach); of token
        classifiers the logits [n, C] in the student's order of labels.

        Raises:
            RuntimeError: from a teacher whose output is not finite.
        """
        mask = self.teaches.to(targets.index.device)[:, batch["language_ids"]]  # [K, N]
        length = batch["input_ids"].shape[1]
        outputs = []
        for k, teacher in enumerate(self.teachers):
            sequences = mask[k].nonzero().squeeze(1)
            here = mask[k][targets.rows]
            # Where each sequence of the batch lies among those that this teacher reads.
            place = mask[k].cumsum(0) - 1
            index = place[targets.rows[here]] * length + targets.index[here] % length
            if len(sequences) > 0:
                inputs = {
                    name: value[sequences].to(teacher.device)
                    for name, value in batch.items()
                    if name in teacher.inputs and isinstance(value, Tensor)
                }
                values = self._run(k, inputs).flatten(0, 1)[index.to(teacher.device)].to(targets.index.device)
                if not values.isfinite().all():
                    raise RuntimeError(f"teacher {teacher.name!r} ({teacher.dtype}) gave values that are not finite")
            else:
                width = len(self._order[k]) if self._order else self.heads[k].width
                values = torch.zeros(0, width, device=targets.index.device)
            output = values.new_zeros(len(here), values.shape[1])
            output[here] = values
            outputs.append(output)
        return outputs, mask[:, targets.rows]

    def _run(self, k: int, inputs: dict[str, Tensor]) -> Tensor:
        """[N, T, H_k] states or [N, T, C] logits of teacher k, in its own precision."""
        teacher = self.teachers[k]
        with torch.autocast(teacher.device.type, enabled=False):
            if self.heads:
                return self.heads[k].hidden(teacher.model, **inputs)
            logits: Tensor = teacher.model(**inputs).logits
        return logits[..., self._order[k]]


class TokenTask:
    """A student's loss and scores in a token task."""

    def __init__(self, task: str, model: PreTrainedModel, languages: Sequence[str]) -> None:
        self.task = task
        self.languages = list(languages)
        self.head = OutputHead(model, "the student") if task in LANGUAGE_MODELS else None
        self._inputs = set(inspect.signature(model.forward).parameters) - {"labels"}

    def loss(
        self, model: nn.Module, batch: Mapping[str, Any], teachers: TokenTeachers | None, **options: Any
    ) -> tuple[Tensor, AMTSSStats | None, Tensor]:
        """The loss of a batch (`options`: of :func:`amtss_fast.amtss_loss`), its stats, the language of each position.

        Without teachers there are no stats.
        """
        targets = _Targets.of(self.task, batch)
        student = self._student(model, batch, targets)
        if teachers is None:
            return _loss(student, self.head, None, targets, **options), None, targets.language_ids
        outputs, mask = teachers.outputs(batch, targets)
        prior = teachers.prior.to(student.device)
        options |= {"teacher_mask": mask, "teacher_prior": prior, "return_stats": True}
        loss, stats = _loss(student, self.head, (outputs, teachers.heads), targets, **options)
        return loss, stats, targets.language_ids

    @torch.no_grad()
    def scores(self, model: nn.Module, batch: Mapping[str, Any], **options: Any) -> Tensor:
        """[N, 3] of each sequence: sum of the cross entropies in nats, positions predicted right, positions.

        `options`: `backend`, `chunk_rows`.
        """
        targets = _Targets.of(self.task, batch)
        return _scores(self._student(model, batch, targets), self.head, targets, len(batch["labels"]), **options)

    def _student(self, model: nn.Module, batch: Mapping[str, Any], targets: _Targets) -> Tensor:
        """States or logits at the n positions that count."""
        inputs = {name: value for name, value in batch.items() if name in self._inputs}
        out: Tensor = model(**inputs).logits if self.head is None else self.head.hidden(model, **inputs)
        out = out.flatten(0, 1)[targets.index]
        device = out.device.type
        if self.head is not None and device != "cpu" and torch.is_autocast_enabled(device):
            # As autocast would have the head that is taken off. A last normalisation leaves its states in float32.
            out = out.to(torch.get_autocast_dtype(device))
        return out


def teacher_scores(teachers: TokenTeachers, batch: Mapping[str, Any]) -> list[Tensor]:
    """:meth:`TokenTask.scores` of each teacher; 0 in the sequences that it does not teach."""
    targets = _Targets.of(teachers.task, batch)
    outputs, mask = teachers.outputs(batch, targets)
    scores = []
    heads: Sequence[OutputHead | None] = teachers.heads or [None] * len(teachers)
    for output, taught, head in zip(outputs, mask, heads, strict=True):
        labels = targets.labels.masked_fill(~taught, IGNORE_INDEX)
        scores.append(_scores(output, head, replace(targets, labels=labels), len(batch["labels"])))
    return scores


def _loss(
    student: Tensor,
    head: OutputHead | None,
    teachers: tuple[list[Tensor], list[OutputHead]] | None,
    targets: _Targets,
    **options: Any,
) -> Any:
    """The loss from a student's states and its head, or from its logits; without teachers for kd_weight 0."""
    device = student.device
    if head is None:
        options.pop("chunk_rows", None)
        # The loss wants a teacher; with kd_weight 0 nobody looks at it.
        logits = [student.detach()] if teachers is None else teachers[0]
        return amtss_loss(student, logits, targets.labels, **options)
    biases: list[Tensor | None] = [None]
    weights: list[Tensor | QuantizedWeight]
    if teachers is None:
        # One class at the least cost.
        hidden, weights = [student.new_zeros(len(student), 1)], [student.new_zeros(1, 1)]
    else:
        hidden = teachers[0]
        weights = [other.weight.to(device) for other in teachers[1]]
        biases = [None if other.bias is None else other.bias.to(device) for other in teachers[1]]
    # A student's head is 8-bit only where a teacher stands in its place to be scored.
    own = head.weight.dequantize() if isinstance(head.weight, QuantizedWeight) else head.weight
    return linear_amtss_loss(
        student,
        own,
        hidden,
        weights,
        targets.labels,
        student_bias=head.bias,
        teacher_bias=biases,
        **options,
    )


def _scores(student: Tensor, head: OutputHead | None, targets: _Targets, n_rows: int, **options: Any) -> Tensor:
    options |= {"kd_weight": 0.0, "ce_weight": 1.0, "reduction": "none", "return_stats": True}
    losses, stats = _loss(student, head, None, targets, **options)
    known = (targets.labels != UNLABELED_INDEX) & (targets.labels != IGNORE_INDEX)
    # The margin of the label over all other classes is positive where it comes first.
    each = torch.stack([losses.float(), (stats.student_margin > 0) & known, known], 1)  # [n, 3]
    return each.new_zeros(n_rows, 3).index_add_(0, targets.rows, each)


def token_metrics(scores: np.ndarray, language_ids: np.ndarray, languages: Sequence[str]) -> dict[str, float]:
    """`accuracy` and `loss` (cross entropy, nats) over all positions with a label; the same, `count` and `gap` (below
    the best language) of each language; `macro_accuracy` and `worst_accuracy` over languages.

    `scores` as of :meth:`TokenTask.scores`.

    Raises:
        ValueError: no position has a label.
    """
    totals = np.zeros((len(languages), 3))
    np.add.at(totals, language_ids, scores.astype(np.float64))
    loss, right, count = totals.sum(0)
    if count == 0:
        raise ValueError(f"no labelled token in {len(scores)} rows to evaluate on")
    metrics = {"accuracy": right / count, "loss": loss / count}
    macro = []
    for code, (loss, right, count) in zip(languages, totals, strict=True):
        if count > 0:
            macro.append(right / count)
            metrics |= {f"accuracy_{code}": right / count, f"loss_{code}": loss / count, f"count_{code}": int(count)}
    gaps = {f"gap_{code}": max(macro) - metrics[f"accuracy_{code}"] for code in languages if f"count_{code}" in metrics}
    return metrics | gaps | {"macro_accuracy": float(np.mean(macro)), "worst_accuracy": min(macro)}


class LanguageModelCollator:
    """Pads encoded rows (:func:`amtss_fast.data.load.encode`) into a batch of a language model.

    `labels` [N, T] are the token ids; for a masked model only those of the chosen tokens, -100 elsewhere. Each token
    that is not special is chosen with `mask_probability`; 8 in 10 of the chosen ones are masked, one is replaced by a
    random one, one is left as it is. The choice depends on seed, epoch and row alone: neither the size of batches nor a
    resume changes it.

    Raises:
        ValueError: a probability outside (0, 1); a masked model's tokenizer without a mask token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, task: str, *, mask_probability: float = 0.15, seed: int = 0
    ) -> None:
        if task not in LANGUAGE_MODELS:
            raise ValueError(f"task must be one of {', '.join(LANGUAGE_MODELS)}; got {task!r}")
        if not 0 < mask_probability < 1:
            raise ValueError(f"mask_probability must be in (0, 1), got {mask_probability}")
        if task == "masked-lm" and tokenizer.mask_token_id is None:
            raise ValueError("a masked language model needs a tokenizer with a mask token, this one has none")
        self._pad = DistillationCollator(tokenizer)
        self._masks = task == "masked-lm"
        self._probability = mask_probability
        self._seed = seed
        self._mask_id = int(tokenizer.mask_token_id) if self._masks else -1
        self._special = np.array(tokenizer.all_special_ids)
        self._n_tokens = len(tokenizer)
        self.epoch = 0

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        ids = [np.asarray(row["input_ids"], dtype=np.int64) for row in rows]
        inputs, labels = zip(*map(self._mask, ids), strict=True) if self._masks else (ids, ids)
        return self._pad([{**row, "input_ids": x, "labels": y} for row, x, y in zip(rows, inputs, labels, strict=True)])

    def _mask(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([self._seed, self.epoch, zlib.crc32(ids.tobytes())])
        chosen = (rng.random(len(ids)) < self._probability) & ~np.isin(ids, self._special)
        what = rng.random(len(ids))
        masked = np.where(chosen & (what < 0.8), self._mask_id, ids)
        masked = np.where(chosen & (what >= 0.9), rng.integers(self._n_tokens, size=len(ids)), masked)
        return masked, np.where(chosen, ids, IGNORE_INDEX)
