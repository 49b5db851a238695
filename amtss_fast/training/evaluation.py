"""Scores of students and teachers on a split, in all and for each language."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from amtss_fast.data.load import DistillationCollator
from amtss_fast.models.student import AMTSSForSequenceClassification
from amtss_fast.teachers.teacher import TeacherPool
from amtss_fast.training.tasks.tokens import (
    LanguageModelCollator,
    TokenTask,
    TokenTeachers,
    teacher_scores,
    token_metrics,
)
from amtss_fast.training.trainer import classification_metrics

STUDENT, BASELINE, TEACHER = "student", "labels only", "teacher:"
"""Names of results: the student, the same one without teachers, and what stands before a teacher's name."""

_STUDENT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "language_ids")


@torch.inference_mode()
def evaluate(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    students: dict[str, AMTSSForSequenceClassification],
    pool: TeacherPool | None = None,
    batch_size: int = 128,
) -> dict[str, Any]:
    """Accuracy and cross entropy per language of students, and of each teacher (`teacher:NAME`) where it teaches.

    `rows`: encoded rows in the students' order of languages.
    """
    languages = next(iter(students.values())).config.languages
    # Long texts first, so that a batch pads little and memory peaks at once.
    lengths = np.array([len(ids) for ids in rows["input_ids"]])
    rows = rows.select(np.argsort(-lengths, kind="stable"))
    collator = DistillationCollator(tokenizer, keep_text=pool is not None and pool.needs_text)
    loader = DataLoader(rows, batch_size=batch_size, collate_fn=collator)
    names = [*students, *(f"{TEACHER}{name}" for name in (pool.names if pool else []))]
    logits: dict[str, list[np.ndarray]] = {name: [] for name in names}
    taught: list[np.ndarray] = []
    for student in students.values():
        student.eval()
    for batch in tqdm(loader, desc="Evaluating"):
        for name, student in students.items():
            inputs = {key: value.to(student.device) for key, value in batch.items() if key in _STUDENT_INPUTS}
            logits[name].append(student(**inputs).logits.float().cpu().numpy())
        if pool is not None:
            teacher_logits, mask = pool.logits(batch)
            taught.append(mask.cpu().numpy())
            for name, values in zip(pool.names, teacher_logits, strict=True):
                logits[f"{TEACHER}{name}"].append(values.cpu().numpy())
    labels, language_ids = np.array(rows["labels"]), np.array(rows["language_ids"])
    results = {}
    for name in names:
        here = np.ones(len(labels), dtype=bool)
        if pool is not None and name.startswith(TEACHER):
            here = np.concatenate(taught, axis=1)[pool.names.index(name.removeprefix(TEACHER))]
        values = np.concatenate(logits[name])[here]
        results[name] = _nested(classification_metrics(values, labels[here], language_ids[here], languages), languages)
    return results


@torch.inference_mode()
def evaluate_tokens(
    rows: Dataset,
    collator: LanguageModelCollator,
    students: dict[str, Any],
    task: str,
    languages: Sequence[str],
    pool: TokenTeachers | None = None,
    batch_size: int = 128,
) -> dict[str, Any]:
    """What :func:`evaluate` gives, over the tokens to predict."""
    lengths = np.array([len(ids) for ids in rows["input_ids"]])
    rows = rows.select(np.argsort(-lengths, kind="stable"))
    tasks = {name: TokenTask(task, student.eval(), languages) for name, student in students.items()}
    names = [*students, *(f"{TEACHER}{name}" for name in (pool.names if pool else []))]
    scores: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for batch in tqdm(DataLoader(rows, batch_size=batch_size, collate_fn=collator), desc="Evaluating"):
        for name, student in students.items():
            on_device = {key: value.to(student.device) for key, value in batch.items()}
            scores[name].append(tasks[name].scores(student, on_device).cpu().numpy())
        if pool is not None:
            for name, values in zip(pool.names, teacher_scores(pool, batch), strict=True):
                scores[f"{TEACHER}{name}"].append(values.cpu().numpy())
    ids = np.array(rows["language_ids"])
    return {
        name: _nested(token_metrics(np.concatenate(values), ids, languages), languages)
        for name, values in scores.items()
    }


def _nested(metrics: dict[str, float], languages: Sequence[str]) -> dict[str, Any]:
    per_language = {
        code: {name: metrics[f"{name}_{code}"] for name in ("accuracy", "gap", "loss", "count")}
        for code in languages
        if f"count_{code}" in metrics
    }
    total = sum(values["count"] for values in per_language.values())
    loss = sum(values["loss"] * values["count"] for values in per_language.values()) / total
    return {
        "accuracy": metrics["accuracy"],
        "macro_accuracy": metrics["macro_accuracy"],
        "worst_accuracy": metrics["worst_accuracy"],
        "loss": loss,
        "per_language": per_language,
    }
