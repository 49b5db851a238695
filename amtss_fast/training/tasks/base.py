"""What a task is: how its batches are made, what its loss compares, and how its models are built and scored.

A :class:`Task` belongs to no model. Its :class:`Objective` belongs to one: it computes loss and scores of that model.
The trainer and the recipes of `amtss_fast.runs` use the two and do not ask which task it is.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from datasets import Dataset, Features
from torch import Tensor, nn
from transformers import EvalPrediction, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from amtss_fast.loss import AMTSSStats
from amtss_fast.teachers import Answers, LiveTeachers, Teacher, Teachers

RowWeights: TypeAlias = Callable[[Tensor], tuple[Tensor | None, Tensor | None]]
"""From the languages of n rows to the teachers' prior [K] or [K, n] and the rows' weight [n], each or None."""


class Rows(NamedTuple):
    """What a student gives for the n rows of a batch that its loss is about: texts, or tokens."""

    student: Tensor
    """[n, C] logits, or [n, H] states that enter a head."""
    labels: Tensor
    """[n] int64."""
    language_ids: Tensor
    """[n] int64."""
    outputs: Any
    """The model's own outputs."""


class Taught(NamedTuple):
    """What the teachers say about the rows of a batch, and who they are."""

    answers: Answers
    teachers: Teachers


@dataclass(frozen=True)
class Step:
    """A batch's loss and what it is made of."""

    loss: Tensor
    rows: Rows
    stats: AMTSSStats | None
    """None without teachers."""
    mask: Tensor | None
    """[K, n] bool, teacher k teaches row n; None without teachers."""


class Objective(ABC):
    """Loss, predictions and scores of one model in a task.

    Args:
        model: the model itself; the methods are also given a wrapper of it, as for several processes.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._inputs = set(inspect.signature(model.forward).parameters) - {"labels"}

    def _forward(self, model: nn.Module, batch: Mapping[str, Any], **more: Any) -> Any:
        """The model's outputs for those entries of the batch that its forward takes, labels aside."""
        return model(**{name: value for name, value in batch.items() if name in self._inputs}, **more)

    def targets(self, batch: Mapping[str, Any]) -> Tensor:
        """The labels of all rows, -100 where a row does not count."""
        labels: Tensor = batch["labels"]
        return labels

    def step(
        self,
        model: nn.Module,
        batch: Mapping[str, Any],
        teachers: Teachers | None,
        weigh: RowWeights | None = None,
        **options: Any,
    ) -> Step:
        """The loss of a batch.

        Args:
            model: the student, or a wrapper of it.
            batch: as the task's collator makes it.
            teachers: None trains on the labels alone, with kd_weight = 0.
            weigh: prior and weights of rows; default: the teachers' priors, and no weights.
            options: of :func:`amtss_fast.amtss_loss`, and `chunk_rows` of a fused head.
        """
        # The teachers start before the student: on CUDA they work beside it.
        asked = None if teachers is None else teachers.ask(batch)
        rows = self.rows(model, batch)
        if teachers is None or asked is None:
            return Step(self.loss(rows, None, **options), rows, None, None)
        answers = asked()
        prior, weight = (teachers.prior, None) if weigh is None else weigh(rows.language_ids)
        loss, stats = self.loss(
            rows,
            Taught(answers, teachers),
            teacher_prior=None if prior is None else prior.to(rows.student.device),
            teacher_mask=answers.mask,
            sample_weight=weight,
            return_stats=True,
            **options,
        )
        return Step(loss, rows, stats, answers.mask)

    @abstractmethod
    def rows(self, model: nn.Module, batch: Mapping[str, Any]) -> Rows:
        """What the student gives for the rows that its loss is about."""

    @abstractmethod
    def loss(self, rows: Rows, taught: Taught | None, **options: Any) -> Any:
        """:func:`amtss_fast.amtss_loss` of these rows, or its fused form; without teachers kd_weight must be 0."""

    @abstractmethod
    def predict(self, model: nn.Module, batch: Mapping[str, Any], **options: Any) -> tuple[Any, Any, Any]:
        """Loss or None, predictions and labels of a batch, as `Trainer.prediction_step` gives them."""

    @abstractmethod
    def scores(self, model: nn.Module, batch: Mapping[str, Any], **options: Any) -> Tensor:
        """[N, 3] of each sequence: sum of the cross entropies in nats, rows predicted right, rows with a label."""


class Task(ABC):
    """One of the tasks of :data:`TASKS`."""

    name: str
    has_labels = True
    """Whether the data has labels, which may be hidden and which teachers are aligned by."""
    is_adaptive = False
    """Whether the adaptive strategy works here."""
    caches_logits = False
    """Whether teachers' logits may be cached, and teachers may take turns on a GPU."""
    fuses_head = False
    """Whether the loss goes through a fused head over a vocabulary."""
    shards_parameters = False
    """Whether parameters may be sharded over processes (FSDP, DeepSpeed)."""

    @abstractmethod
    def objective(self, model: PreTrainedModel) -> Objective:
        """The objective of a model; UserError for a model of another task."""

    @abstractmethod
    def collator(
        self, tokenizer: PreTrainedTokenizerBase, *, keep_text: bool, mask_probability: float, seed: int
    ) -> Any:
        """What makes batches of encoded rows."""

    @abstractmethod
    def metrics(self, prediction: EvalPrediction, languages: Sequence[str]) -> dict[str, float]:
        """Metrics of what :meth:`Objective.predict` gave."""

    @abstractmethod
    def label_names(self, features: Features) -> list[str]:
        """The names of the classes in order; empty where the classes are a vocabulary."""

    @abstractmethod
    def new_model(
        self, encoder: str | PretrainedConfig, *, languages: Sequence[str], label_names: Sequence[str], **options: Any
    ) -> PreTrainedModel:
        """A model on an encoder: a folder or Hub id, or a configuration for fresh weights."""

    @abstractmethod
    def load_model(self, folder: str | Path) -> PreTrainedModel:
        """A model that was trained, in float32."""

    @abstractmethod
    def teachers(
        self,
        teachers: Sequence[Teacher],
        *,
        label_names: Sequence[str],
        languages: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        **turns: Any,
    ) -> LiveTeachers:
        """Several loaded teachers beside one student; `turns`: `resident` and `device` of those that take turns."""

    @abstractmethod
    def teacher_scores(self, teachers: Teachers, batch: Mapping[str, Any]) -> list[Tensor]:
        """K of [N, 3], as :meth:`Objective.scores`; 0 in the sequences that a teacher does not teach."""

    @abstractmethod
    def hide_labels(self, rows: Dataset, fraction: float, *, seed: int) -> Dataset:
        """Training rows of which a fraction of the labels is left."""

    @abstractmethod
    def labeled_rows(self, rows: Dataset) -> Dataset:
        """The rows that a student without teachers can learn from."""


def logit_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """[N, 3] of each row, as :meth:`Objective.scores`; rows with a label below 0 are 0."""
    known = labels >= 0
    target = labels.where(known, 0)
    losses = torch.nn.functional.cross_entropy(logits.double(), target, reduction="none")
    scores = torch.stack([losses, (logits.argmax(-1) == labels).double(), torch.ones_like(losses)], 1)
    return scores.where(known.unsqueeze(1), 0.0)
