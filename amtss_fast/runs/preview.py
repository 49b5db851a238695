"""What a run will do, take and show, as a text, before it starts."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from amtss_fast.runs.build import new_student
from amtss_fast.runs.config import RunConfig
from amtss_fast.runs.fitting import step_prober
from amtss_fast.runs.preflight import Preflight, check_run
from amtss_fast.runs.setup import Setup, prepare, student_arguments
from amtss_fast.training.evaluation import STUDENT


def preview(config: RunConfig) -> str:
    """Checks a run as `train` does, and says what it will do; nothing is written.

    Memory and time are those of two steps of the student on the longest texts, with the teachers that are loaded: the
    time of a run is mostly less. They are left out where a teacher has to be trained first, or logits are cached.

    Raises:
        UserError, FileNotFoundError, FileExistsError: as :func:`amtss_fast.runs.distil`.
    """
    setup = prepare(config, resume=True)
    setup.folder.check(overwrite=True)
    checked = check_run(setup)
    lines = [*_data_lines(setup, checked), "", *_teacher_lines(setup, checked), "", *_training_lines(checked)]
    lines += [f"Note: {note}" for note in checked.notes]
    if checked.teachers is not None and any(training.name == STUDENT for training in checked.trainings):
        lines.append(_measured(setup, checked))
    return "\n".join(lines)


def _data_lines(setup: Setup, checked: Preflight) -> list[str]:
    rows = [["rows", *checked.rows]]
    for code in setup.languages:
        rows.append([code, *(f"{counts.get(code, 0):,}" for counts in checked.rows.values())])
    rows.append(["all", *(f"{sum(counts.values()):,}" for counts in checked.rows.values())])
    return _columns(rows)


def _teacher_lines(setup: Setup, checked: Preflight) -> list[str]:
    trained = {training.name for training in checked.trainings}
    rows = [["teacher", "from", "teaches"]]
    for teacher in setup.config.teachers:
        source = teacher.path or ("trained first" if teacher.name in trained else "trained before")
        taught = checked.teaches[teacher.name]
        rows.append([teacher.name, source, "all" if taught == setup.languages else ", ".join(taught)])
    return _columns(rows, left=3)


def _training_lines(checked: Preflight) -> list[str]:
    if not checked.trainings:
        return ["Everything is trained."]
    rows = [["training", "rows", "languages", "steps", "parameters", "disk"]]
    for plan in checked.trainings:
        counts = [f"{plan.rows:,}", str(len(plan.languages)), f"{plan.steps:,}"]
        rows.append([plan.name, *counts, f"{plan.parameters / 1e6:.1f} M", f"{plan.disk / 1e6:,.0f} MB"])
    return _columns(rows)


def _columns(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Rows with aligned columns, the first `left` of them to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _measured(setup: Setup, checked: Preflight) -> str:
    arguments = student_arguments(setup.config)
    step = step_prober(setup, new_student(setup), checked.teachers, arguments.chunk_rows)
    shape = (
        arguments.per_device_train_batch_size,
        bool(arguments.activation_checkpointing),
        arguments.gradient_accumulation_steps,
    )
    # The first step also compiles kernels and allocates.
    step(*shape)
    started = time.perf_counter()
    memory = step(*shape)
    if setup.device.type == "cuda":
        torch.cuda.synchronize(setup.device)
    # The prober runs two micro-batches of a step at most.
    seconds = (time.perf_counter() - started) * max(1, arguments.gradient_accumulation_steps / 2)
    steps = next(training.steps for training in checked.trainings if training.name == STUDENT)
    return (
        f"Student: {memory / 1e9:.2f} GB of memory and at most {seconds:.2f} s per step on {setup.device} with the "
        f"longest texts, at most {seconds * steps / 60:.1f} min in all, evaluation aside"
    )
