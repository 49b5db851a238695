"""Tasks whose rows are tokens: classification of words, masked and causal language models.

Batches hold `input_ids`, `attention_mask` and `labels` [N, T] and `language_ids` [N]. The rows of the loss are the
positions that count. Language models go through the fused head, so that no logits of a vocabulary are ever held.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, List
from torch import Tensor, nn
from transformers import EvalPrediction, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from amtss_fast.data import DistillationCollator, LanguageModelCollator, keep_labels
from amtss_fast.data.targets import Targets, token_targets
from amtss_fast.errors import UserError
from amtss_fast.loss import QuantizedWeight, linear_amtss_loss
from amtss_fast.loss.options import IGNORE_INDEX
from amtss_fast.models.checkpoints import load_model
from amtss_fast.models.heads import OutputHead
from amtss_fast.teachers import TASK_MODELS, Teacher, Teachers, TokenTeachers
from amtss_fast.teachers.contract import dense
from amtss_fast.training.metrics import score_metrics
from amtss_fast.training.tasks.base import Objective, Rows, Task, Taught
from amtss_fast.training.tasks.classification import logits_loss


def head_loss(head: OutputHead, rows: Rows, taught: Taught | None, **options: Any) -> Any:
    """:func:`amtss_fast.linear_amtss_loss` of rows that hold the states [n, H] that enter a head."""
    student, device = rows.student, rows.student.device
    # A teacher is required; it is unused when kd_weight = 0, and one class costs least.
    hidden: Sequence[Any] = [student.new_zeros(len(student), 1)]
    weights: list[Tensor | QuantizedWeight] = [student.new_zeros(1, 1)]
    biases: list[Tensor | None] = [None]
    caps: list[float | None] = [None]
    if taught is not None:
        heads = taught.teachers.heads
        hidden = taught.answers.outputs
        weights = [other.weight.to(device) for other in heads]
        biases = [None if other.bias is None else other.bias.to(device) for other in heads]
        caps = [other.softcap for other in heads]
    # The head is in 8 bits only where a teacher is scored in the student's place.
    weight = head.weight.dequantize() if isinstance(head.weight, QuantizedWeight) else head.weight
    return linear_amtss_loss(
        student,
        weight,
        hidden,
        weights,
        rows.labels,
        student_bias=head.bias,
        teacher_bias=biases,
        # Scales are in hidden states and biases.
        student_softcap=head.softcap,
        teacher_softcap=caps,
        **options,
    )


def token_scores(loss: Callable[..., Any], rows: Rows, sequences: Tensor, n_sequences: int, **options: Any) -> Tensor:
    """[N, 3] of each sequence, as `Objective.scores`; `loss` is one of the two above, `sequences` [n] of each row."""
    options |= {"kd_weight": 0.0, "ce_weight": 1.0, "reduction": "none", "return_stats": True}
    losses, stats = loss(rows, None, **options)
    known = rows.labels >= 0
    # The margin of the label over all other classes is positive where its logit is the largest.
    each = torch.stack([losses.float(), (stats.student_margin > 0) & known, known], 1)  # [n, 3]
    return each.new_zeros(n_sequences, 3).index_add_(0, sequences, each)


class TokenObjective(Objective):
    """What the tasks of tokens share; the rows are the n positions that count, as `Targets` lists them."""

    def __init__(self, model: PreTrainedModel, task: str) -> None:
        super().__init__(model)
        self.task = task

    def targets(self, batch: Mapping[str, Any]) -> Tensor:
        return token_targets(self.task, batch)

    def rows(self, model: nn.Module, batch: Mapping[str, Any]) -> Rows:
        targets = Targets.of(self.task, batch)
        student, outputs = self._student(model, batch)
        return Rows(student.flatten(0, 1)[targets.index], targets.labels, targets.language_ids, outputs)

    def _student(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """Logits or states [N, T, *], and the model's own outputs."""
        outputs = self._forward(model, batch)
        return outputs.logits, outputs

    def loss(self, rows: Rows, taught: Taught | None, **options: Any) -> Any:
        return logits_loss(rows, taught, **options)

    @torch.no_grad()
    def scores(self, model: nn.Module, batch: Mapping[str, Any], **options: Any) -> Tensor:
        sequences = Targets.of(self.task, batch).rows
        return token_scores(self.loss, self.rows(model, batch), sequences, len(batch["labels"]), **options)

    def predict(self, model: nn.Module, batch: Mapping[str, Any], **options: Any) -> tuple[Any, Any, Any]:
        """In the place of logits the scores of each sequence, which are all that metrics need."""
        return None, self.scores(model, batch, **options), batch["language_ids"]


class HeadObjective(TokenObjective):
    """A language model without its head: states [n, H] and the fused loss."""

    def __init__(self, model: PreTrainedModel, task: str) -> None:
        super().__init__(model, task)
        self.head = OutputHead(model, "the student")

    def rows(self, model: nn.Module, batch: Mapping[str, Any]) -> Rows:
        rows = super().rows(model, batch)
        device = rows.student.device.type
        if device == "cpu" or not torch.is_autocast_enabled(device):
            return rows
        # As autocast casts the input of the head. A last normalization leaves its states in float32.
        return rows._replace(student=rows.student.to(torch.get_autocast_dtype(device)))

    def _student(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
        inputs = {name: value for name, value in batch.items() if name in self._inputs}
        return self.head.hidden(model, **inputs), None

    def loss(self, rows: Rows, taught: Taught | None, **options: Any) -> Any:
        return head_loss(self.head, rows, taught, **options)


class _TokenTask(Task):
    def metrics(self, prediction: EvalPrediction, languages: Sequence[str]) -> dict[str, float]:
        scores: Any = prediction.predictions
        language_ids: Any = prediction.label_ids
        return score_metrics(scores, language_ids, languages)

    def teachers(
        self,
        teachers: Sequence[Teacher],
        *,
        label_names: Sequence[str],
        languages: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        **turns: Any,
    ) -> TokenTeachers:
        names = label_names if self.has_labels else None
        return TokenTeachers(
            teachers, task=self.name, languages=languages, tokenizer=tokenizer, label_names=names, **turns
        )

    def teacher_scores(self, teachers: Teachers, batch: Mapping[str, Any]) -> list[Tensor]:
        targets, answers = Targets.of(self.name, batch), teachers.ask(batch)()
        scores = []
        for k, (output, taught) in enumerate(zip(answers.outputs, answers.mask, strict=True)):
            labels = targets.labels.masked_fill(~taught, IGNORE_INDEX)
            rows = Rows(dense(output), labels, targets.language_ids, None)
            loss = partial(head_loss, teachers.heads[k]) if self.fuses_head else logits_loss
            scores.append(token_scores(loss, rows, targets.rows, len(batch["labels"])))
        return scores

    def load_model(self, folder: str | Path) -> PreTrainedModel:
        model: PreTrainedModel = load_model(TASK_MODELS[self.name], folder, whose="student", dtype=torch.float32)
        return model


class TokenClassification(_TokenTask):
    """Texts as lists of words, each word with one label."""

    name = "token-classification"

    def objective(self, model: PreTrainedModel) -> Objective:
        return TokenObjective(model, self.name)

    def collator(
        self, tokenizer: PreTrainedTokenizerBase, *, keep_text: bool, mask_probability: float, seed: int
    ) -> DistillationCollator:
        return DistillationCollator(tokenizer, keep_text=keep_text)

    def label_names(self, features: Features) -> list[str]:
        label = features["label"]
        if not isinstance(label, List):
            raise UserError(
                "task 'token-classification' needs lists of words and of their labels, the data has one label per "
                "text; name the columns with data.text and data.label"
            )
        return list(label.feature.names)

    def new_model(
        self, encoder: str | PretrainedConfig, *, languages: Sequence[str], label_names: Sequence[str], **options: Any
    ) -> PreTrainedModel:
        ids = {name: index for index, name in enumerate(label_names)}
        labels: dict[str, Any] = {"id2label": dict(enumerate(label_names)), "label2id": ids}
        kind = TASK_MODELS[self.name]
        model: PreTrainedModel
        if isinstance(encoder, str):
            # A pretrained encoder gets a new classifier.
            model = load_model(kind, encoder, whose="encoder", new_head=True, dtype=torch.float32, **labels)
            return model
        for name, value in labels.items():
            setattr(encoder, name, value)
        model = kind.from_config(encoder)
        return model

    def hide_labels(self, rows: Dataset, fraction: float, *, seed: int) -> Dataset:
        return keep_labels(rows, fraction, seed=seed)

    def labeled_rows(self, rows: Dataset) -> Dataset:
        return rows.filter(lambda labels: max(labels) >= 0, input_columns="label")


class LanguageModel(_TokenTask):
    """Masked and causal language models: every text teaches, and the classes are the vocabulary."""

    has_labels = False
    fuses_head = True

    def __init__(self, name: str) -> None:
        self.name = name

    def objective(self, model: PreTrainedModel) -> Objective:
        return HeadObjective(model, self.name)

    def collator(
        self, tokenizer: PreTrainedTokenizerBase, *, keep_text: bool, mask_probability: float, seed: int
    ) -> LanguageModelCollator:
        return LanguageModelCollator(tokenizer, self.name, mask_probability=mask_probability, seed=seed)

    def label_names(self, features: Features) -> list[str]:
        return []

    def new_model(
        self, encoder: str | PretrainedConfig, *, languages: Sequence[str], label_names: Sequence[str], **options: Any
    ) -> PreTrainedModel:
        if isinstance(encoder, str):
            return self.load_model(encoder)
        model: PreTrainedModel = TASK_MODELS[self.name].from_config(encoder)
        return model

    def hide_labels(self, rows: Dataset, fraction: float, *, seed: int) -> Dataset:
        return rows

    def labeled_rows(self, rows: Dataset) -> Dataset:
        return rows
