"""Classification of texts: a row is a text, and the student is the one with a projection per language."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features
from torch import Tensor, nn
from transformers import EvalPrediction, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from amtss_fast.data import DistillationCollator, keep_labels
from amtss_fast.errors import UserError
from amtss_fast.loss import amtss_loss
from amtss_fast.models import AMTSSForSequenceClassification
from amtss_fast.teachers import Teacher, TeacherPool, Teachers
from amtss_fast.teachers.contract import dense
from amtss_fast.training.metrics import language_metrics
from amtss_fast.training.tasks.base import Objective, Rows, Task, Taught, logit_scores


def logits_loss(rows: Rows, taught: Taught | None, chunk_rows: int | None = None, **options: Any) -> Any:
    """:func:`amtss_fast.amtss_loss` of rows that hold logits [n, C]; they have no head, and `chunk_rows` is unused."""
    # A teacher is required; it is unused when kd_weight = 0.
    logits = [rows.student.detach()] if taught is None else taught.answers.outputs
    return amtss_loss(rows.student, logits, rows.labels, **options)


class _TextObjective(Objective):
    def rows(self, model: nn.Module, batch: Mapping[str, Any]) -> Rows:
        outputs = self._forward(model, batch)
        return Rows(outputs.logits, batch["labels"], batch["language_ids"], outputs)

    def loss(self, rows: Rows, taught: Taught | None, **options: Any) -> Any:
        return logits_loss(rows, taught, **options)

    def predict(self, model: nn.Module, batch: Mapping[str, Any], **options: Any) -> tuple[Any, Any, Any]:
        labels = batch.get("labels")
        if labels is None:
            return None, self._forward(model, batch).logits, None
        outputs = self._forward(model, batch, labels=labels)
        return outputs.loss.mean(), outputs.logits, (labels, batch["language_ids"])

    def scores(self, model: nn.Module, batch: Mapping[str, Any], **options: Any) -> Tensor:
        return logit_scores(self._forward(model, batch).logits.float(), batch["labels"])


class SequenceClassification(Task):
    """Texts, or pairs of them, each with one label."""

    name = "sequence-classification"
    is_adaptive = True
    caches_logits = True
    shards_parameters = True

    def objective(self, model: PreTrainedModel) -> Objective:
        if not isinstance(model, AMTSSForSequenceClassification):
            raise UserError(f"task {self.name!r} trains an AMTSSForSequenceClassification, got {type(model).__name__}")
        return _TextObjective(model)

    def collator(
        self, tokenizer: PreTrainedTokenizerBase, *, keep_text: bool, mask_probability: float, seed: int
    ) -> DistillationCollator:
        return DistillationCollator(tokenizer, keep_text=keep_text)

    def metrics(self, prediction: EvalPrediction, languages: Sequence[str]) -> dict[str, float]:
        return language_metrics(prediction, languages)

    def label_names(self, features: Features) -> list[str]:
        return list(features["label"].names)

    def new_model(
        self, encoder: str | PretrainedConfig, *, languages: Sequence[str], label_names: Sequence[str], **options: Any
    ) -> AMTSSForSequenceClassification:
        return AMTSSForSequenceClassification.from_encoder(
            encoder, languages=languages, id2label=label_names, **options
        )

    def load_model(self, folder: str | Path) -> AMTSSForSequenceClassification:
        model: AMTSSForSequenceClassification = AMTSSForSequenceClassification.from_pretrained(folder)
        return model

    def teachers(
        self,
        teachers: Sequence[Teacher],
        *,
        label_names: Sequence[str],
        languages: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        **turns: Any,
    ) -> TeacherPool:
        return TeacherPool(teachers, label_names=label_names, languages=languages, tokenizer=tokenizer, **turns)

    def teacher_scores(self, teachers: Teachers, batch: Mapping[str, Any]) -> list[Tensor]:
        answers, labels = teachers.ask(batch)(), batch["labels"].to(batch["language_ids"].device)
        return [
            logit_scores(dense(logits).float(), labels).where(taught.unsqueeze(1), 0.0)
            for logits, taught in zip(answers.outputs, answers.mask, strict=True)
        ]

    def hide_labels(self, rows: Dataset, fraction: float, *, seed: int) -> Dataset:
        return keep_labels(rows, fraction, seed=seed)

    def labeled_rows(self, rows: Dataset) -> Dataset:
        return rows.filter(lambda label: label >= 0, input_columns="label")
