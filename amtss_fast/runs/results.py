"""The scores of a run's models on its test split, and what `metrics.json` says beside them."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

import torch
from datasets import Dataset, DatasetDict

from amtss_fast.data import label_counts, language_counts
from amtss_fast.runs.memory_plan import MemoryPlan
from amtss_fast.runs.setup import Setup
from amtss_fast.teachers import Teachers
from amtss_fast.training import Task, evaluate


def report_split(task: Task, data: DatasetDict) -> str | None:
    """The split to report on: the test split, else the validation split; None where neither has a label."""
    labeled = (
        split for split in ("test", "validation") if split in data and any(scored_rows(task, data[split]).values())
    )
    return next(labeled, None)


def scored_rows(task: Task, rows: Dataset) -> dict[str, int]:
    """The rows of each language that a task can score."""
    return label_counts(rows) if task.has_labels else language_counts(rows)


def run_metrics(
    setup: Setup, students: Mapping[str, Any], teachers: Teachers, sizes: Mapping[str, int], plan: MemoryPlan | None
) -> dict[str, Any]:
    """What `metrics.json` holds of a run, but for its times; without a split to score `split` is None, `test` empty."""
    split, scores = report_split(setup.task, setup.data), {}
    if split is not None:
        rows = setup.encode(setup.data[split], keep_text=teachers.needs_text)
        collator = setup.collator(teachers.needs_text)
        scores = evaluate(setup.task, rows, collator, students, setup.languages, teachers)
    taught = teachers.teaches.tolist()
    return {
        "task": setup.config.title or setup.config.task,
        "languages": setup.languages,
        "label_names": setup.label_names,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("amtss-fast", "torch", "transformers", "datasets", "accelerate")},
        "machine": f"{machine()}, {torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}",
        "split": split,
        "test": scores,
        "teacher_languages": {
            name: [code for code, teaches in zip(setup.languages, row, strict=True) if teaches]
            for name, row in zip(teachers.names, taught, strict=True)
        },
        "sizes": {**{name: model.num_parameters() for name, model in students.items()}, **sizes},
        **({} if plan is None else {"memory": asdict(plan)}),
        "config": setup.config.model_dump(),
    }


def machine() -> str:
    """Processor type and number of cores."""
    return f"{platform.machine()}, {os.cpu_count()} cores"
