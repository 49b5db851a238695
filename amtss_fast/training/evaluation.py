"""Scores of students and teachers on a split, over all rows and over each language."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from amtss_fast.errors import NotFiniteError
from amtss_fast.teachers import Teachers
from amtss_fast.training.metrics import by_language, score_metrics
from amtss_fast.training.tasks import Task

STUDENT, BASELINE, TEACHER = "student", "labels only", "teacher:"
"""Names of results: the student, the same one without teachers, and the prefix of a teacher's name."""


@torch.inference_mode()
def evaluate(
    task: Task,
    rows: Dataset,
    collator: Callable[[list[Any]], Mapping[str, Any]],
    students: Mapping[str, PreTrainedModel],
    languages: Sequence[str],
    teachers: Teachers | None = None,
    batch_size: int = 128,
) -> dict[str, Any]:
    """Accuracy and cross entropy per language of students, and of each teacher (`teacher:NAME`) where it teaches.

    Args:
        task: what they do.
        rows: encoded rows.
        collator: the task's; it keeps texts where the teachers need them.
        students: by name of their results.
        languages: what `language_ids` of the rows number.
        teachers: those to score as well.
        batch_size: rows of a forward pass.

    Raises:
        NotFiniteError: a model gave NaN or an infinity; the message names it.
    """
    # Long texts first, so that a batch pads little and memory reaches its peak at once.
    lengths = np.array([len(ids) for ids in rows["input_ids"]])
    rows = rows.select(np.argsort(-lengths, kind="stable"))
    objectives = {name: task.objective(student.eval()) for name, student in students.items()}
    names = [*students, *(f"{TEACHER}{name}" for name in (teachers.names if teachers else []))]
    scores: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for batch in tqdm(DataLoader(rows, batch_size=batch_size, collate_fn=collator), desc="Evaluating"):
        for name, student in students.items():
            on_device = {
                key: value.to(student.device) for key, value in batch.items() if isinstance(value, torch.Tensor)
            }
            scores[name].append(objectives[name].scores(student, on_device).cpu().numpy())
        if teachers is not None:
            for name, values in zip(teachers.names, task.teacher_scores(teachers, batch), strict=True):
                scores[f"{TEACHER}{name}"].append(values.cpu().numpy())
    for name, parts in scores.items():
        lost = sum(int((~np.isfinite(part).all(1)).sum()) for part in parts)
        if lost:
            raise NotFiniteError(f"{name} gave outputs that are not finite in {lost} of {len(rows)} rows")
    ids = np.array(rows["language_ids"])
    return {
        name: by_language(score_metrics(np.concatenate(values), ids, languages), languages)
        for name, values in scores.items()
    }
