"""What is known before the first training step, checked before it: data beside models, settings beside data, the disk.

Each check raises a :class:`~amtss_fast.errors.UserError` that names the setting, the split or the model. Nothing is
written.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import DatasetDict
from transformers import PreTrainedModel
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from amtss_fast._compat.transformers import prepare_inputs
from amtss_fast.data import language_counts
from amtss_fast.errors import UserError
from amtss_fast.models import check_code, max_positions, sees_later_tokens
from amtss_fast.runs.build import (
    last_checkpoint,
    load_teachers,
    make_trial,
    new_model,
    new_student,
    taught_languages,
)
from amtss_fast.runs.config import TeacherConfig
from amtss_fast.runs.results import report_split, scored_rows
from amtss_fast.runs.setup import Setup, labels_only_options, student_arguments, teacher_arguments, training_arguments
from amtss_fast.teachers import LiveTeachers
from amtss_fast.training import AMTSSTrainingArguments
from amtss_fast.training.evaluation import STUDENT
from amtss_fast.training.metrics import metric_names

LABELS_ONLY = "labels-only"
# Rows that go through a model once, and bytes of a parameter's weight and of its weight and optimizer state on disk.
_TRIED_ROWS = 8
_WEIGHT_BYTES, _CHECKPOINT_BYTES = 4, 12


@dataclass(frozen=True)
class PlannedTraining:
    """A training that a run has before it."""

    name: str
    languages: list[str]
    rows: int
    steps: int
    parameters: int
    disk: int
    """Bytes of the model and of its checkpoints."""


@dataclass(frozen=True)
class Preflight:
    """What a run will do."""

    rows: dict[str, dict[str, int]]
    """Rows by split and language."""
    teaches: dict[str, list[str]]
    """The languages of each teacher."""
    trainings: list[PlannedTraining]
    notes: list[str]
    """What is allowed and may surprise."""
    teachers: LiveTeachers | None
    """Loaded for the check, and of use afterwards; None where a teacher is trained first, or teachers are cached."""


def check_run(setup: Setup, *, ask_teachers: bool = True) -> Preflight:
    """Checks a run as far as it can be known, in seconds; what is trained already is not checked again.

    Args:
        setup: the run; where `resume` is set, models in its folder are kept.
        ask_teachers: loads the teachers that have a checkpoint, and runs each on a few rows.

    Raises:
        UserError, FileNotFoundError: what would fail later, or have no effect.
    """
    _check_languages(setup)
    teaches = {teacher.name: _teacher_languages(setup, teacher) for teacher in setup.config.teachers}
    notes = _notes(setup, teaches)
    trainings = [_check_teacher(setup, teacher) for teacher in untrained(setup)]
    teachers = _try_teachers(setup) if ask_teachers else None
    if not _is_done(setup, setup.folder.student):
        trainings.append(_check_student(setup, teachers))
    if setup.config.labels_only and not _is_done(setup, setup.folder.labels_only):
        trainings.append(_check_labels_only(setup))
    if setup.resume:
        for training in trainings:
            last_checkpoint(setup.folder.training(training.name), student_arguments(setup.config).world_size)
    _check_disk(setup, trainings)
    rows = {split: language_counts(rows) for split, rows in setup.data.items()}
    return Preflight(rows, teaches, trainings, notes, teachers)


def untrained(setup: Setup) -> list[TeacherConfig]:
    """The teachers that the run has to train."""
    teachers = setup.config.teachers
    return [t for t in teachers if t.model is not None and not _is_done(setup, setup.folder.teacher(t.name))]


def _is_done(setup: Setup, model: Path) -> bool:
    """Whether a model is trained; only a run that continues keeps what is in its folder."""
    return setup.resume and model.is_dir()


def _check_languages(setup: Setup) -> None:
    for code in setup.languages:
        check_code(code)
    for split, rows in setup.data.items():
        counts = language_counts(rows)
        unknown = sorted(set(counts) - set(setup.languages))
        if unknown:
            raise UserError(
                f"the {split} split has rows in {', '.join(unknown)}, which the student does not learn: it has "
                f"{', '.join(setup.languages)} (data.languages, or else those of the training rows)"
            )
        if split == "train" and (missing := [code for code in setup.languages if code not in counts]):
            raise UserError(f"the train split has no row in {', '.join(missing)}; rows per language: {counts}")


def _teacher_languages(setup: Setup, teacher: TeacherConfig) -> list[str]:
    lacking = [code for code in teacher.languages or () if code not in setup.languages]
    if lacking:
        raise UserError(
            f"teacher {teacher.name!r} teaches {', '.join(lacking)}, which the student does not learn: it has "
            f"{', '.join(setup.languages)}"
        )
    if teacher.path is None:
        return list(teacher.languages or setup.languages)
    return taught_languages(setup, teacher)


def _notes(setup: Setup, teaches: dict[str, list[str]]) -> list[str]:
    notes = []
    split = report_split(setup.task, setup.data)
    if split is None:
        notes.append("no test or validation split has labels: nothing will be scored")
    elif "test" in setup.data and split != "test":
        notes.append(f"the test split has no labels: scores will be of the {split} split")
    alone = [code for code in setup.languages if not any(code in codes for codes in teaches.values())]
    if alone:
        notes.append(f"no teacher teaches {', '.join(alone)}: these rows learn from their labels alone")
    return notes


def _check_teacher(setup: Setup, teacher: TeacherConfig) -> PlannedTraining:
    languages = list(teacher.languages or setup.languages)
    wanted = set(languages)
    counts = {}
    for split, rows in setup.data.items():
        counts[split] = {code: n for code, n in scored_rows(setup.task, rows).items() if code in wanted and n}
    whose = f"teacher {teacher.name!r}"
    if not counts["train"]:
        raise UserError(f"{whose} has nothing to learn from: no training row in {', '.join(languages)} has a label")
    arguments = teacher_arguments(setup.config, teacher)
    n_rows = sum(count for code, count in language_counts(setup.data["train"]).items() if code in wanted)
    steps = _check_training(setup, whose, arguments, n_rows, counts.get("validation"))
    assert teacher.model is not None
    model = new_model(setup, teacher.model, languages)
    _check_model(setup, whose, model)
    try_training(setup, model, None, arguments, languages)
    return _planned(teacher.name, languages, n_rows, steps, model, arguments)


def _check_student(setup: Setup, teachers: LiveTeachers | None) -> PlannedTraining:
    arguments, n_rows = student_arguments(setup.config), len(setup.data["train"])
    labeled = _labeled(setup)
    if arguments.is_adaptive and not any(any(counts.values()) for counts in labeled.values()):
        raise UserError(
            "training.importance_temperature and training.gap_temperature learn from rows with a label, and no "
            "training or validation row has one"
        )
    steps = _check_training(setup, STUDENT, arguments, n_rows, labeled.get("validation"))
    model = new_student(setup)
    _check_model(setup, STUDENT, model)
    tried = arguments
    if teachers is None:
        tried = training_arguments(setup.config, STUDENT, labels_only_options(setup.config, n_rows))
    try_training(setup, model, teachers, tried, setup.languages)
    return _planned(STUDENT, setup.languages, n_rows, steps, model, arguments)


def _check_labels_only(setup: Setup) -> PlannedTraining:
    labeled = _labeled(setup)
    n_rows = sum(labeled["train"].values())
    if n_rows == 0:
        raise UserError("labels_only trains a student on labels alone, and no training row has a label")
    options = labels_only_options(setup.config, len(setup.data["train"]))
    arguments = training_arguments(setup.config, LABELS_ONLY, options)
    steps = _check_training(setup, LABELS_ONLY, arguments, n_rows, labeled.get("validation"))
    return _planned(LABELS_ONLY, setup.languages, n_rows, steps, new_student(setup), arguments)


def _labeled(setup: Setup) -> dict[str, dict[str, int]]:
    """Rows with a label by split and language, the hidden ones of the training rows left out."""
    data = setup.student_data()
    splits = [split for split in ("train", "validation") if split in data]
    return {split: scored_rows(setup.task, data[split]) for split in splits}


def _check_training(
    setup: Setup, whose: str, args: AMTSSTrainingArguments, n_rows: int, validation: dict[str, int] | None
) -> int:
    """The optimizer steps of a training; UserError where there is none, or no way to evaluate as asked.

    Args:
        whose: the model, for messages.
        validation: labeled rows of the validation split by language; None without such a split.
    """
    per_batch = args.train_batch_size * args.world_size
    batches = n_rows // per_batch if args.dataloader_drop_last else math.ceil(n_rows / per_batch)
    if batches == 0:
        raise UserError(
            f"{whose}: dataloader_drop_last=True leaves no batch: {n_rows} training rows, and a batch takes {per_batch}"
        )
    per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(per_epoch * args.num_train_epochs)
    if steps < 1:
        raise UserError(f"{whose}: num_train_epochs={args.num_train_epochs:g} leaves no training step")
    best = args.metric_for_best_model
    strategy = IntervalStrategy(args.eval_strategy)
    if strategy == IntervalStrategy.NO:
        return steps
    if not validation or not sum(validation.values()):
        what = "has no validation split" if validation is None else "has no label in the validation split"
        raise UserError(
            f"{whose}: eval_strategy={strategy.value!r} evaluates on the validation split, and the data "
            f"{what}; data.validation_fraction takes one from the training rows"
        )
    names = metric_names([code for code, count in validation.items() if count])
    if best is not None and best.removeprefix("eval_") not in names:
        shown = [name for name in names if not name.endswith(tuple(f"_{code}" for code in setup.languages))]
        raise UserError(
            f"{whose}: metric_for_best_model={best!r} is not computed; the metrics are {', '.join(shown)}, and "
            "accuracy_CODE, loss_CODE, count_CODE, gap_CODE of each language"
        )
    return steps


def _check_model(setup: Setup, whose: str, model: PreTrainedModel) -> None:
    check_positions(setup, whose, max_positions(model.config))
    if setup.task.name == "causal-lm" and sees_later_tokens(model):
        raise UserError(
            f"{whose}: a {type(model).__name__} sees the tokens that it has to predict (its outputs change with later "
            "tokens): task 'causal-lm' needs a causal model; in models like BERT set is_decoder=True"
        )


def check_positions(setup: Setup, whose: str, limit: int | None) -> None:
    """UserError where a model of at most `limit` tokens meets longer rows."""
    if limit is not None and limit < setup.config.data.max_length:
        raise UserError(
            f"{whose} takes at most {limit} tokens, and data.max_length is {setup.config.data.max_length}: set "
            f"data.max_length={limit}, or give the model more positions"
        )


def _planned(
    name: str, languages: Sequence[str], rows: int, steps: int, model: Any, args: AMTSSTrainingArguments
) -> PlannedTraining:
    size, strategy = int(model.num_parameters()), SaveStrategy(args.save_strategy).value
    saved = 0
    if strategy == "steps":
        every = args.save_steps if args.save_steps >= 1 else max(1, math.ceil(args.save_steps * steps))
        saved = steps // int(every)
    elif strategy != "no":
        saved = max(1, math.ceil(args.num_train_epochs))
    if args.save_total_limit:
        saved = min(saved, args.save_total_limit + 1)
    return PlannedTraining(name, list(languages), rows, steps, size, size * (_WEIGHT_BYTES + saved * _CHECKPOINT_BYTES))


def _check_disk(setup: Setup, trainings: Sequence[PlannedTraining]) -> None:
    place = setup.folder.path.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"output_dir: cannot write to {place}")
    free, needed = shutil.disk_usage(place).free, sum(training.disk for training in trainings)
    if needed > free:
        raise UserError(
            f"output_dir: models and checkpoints take about {needed / 1e9:.2f} GB, {place} has {free / 1e9:.2f} GB "
            "free; training.save_total_limit keeps fewer checkpoints"
        )


def _try_teachers(setup: Setup) -> LiveTeachers | None:
    """The teachers that have a checkpoint, loaded, each asked once; kept where all can be used at once."""
    config = setup.config
    missing = {teacher.name for teacher in untrained(setup)}
    here = [teacher for teacher in config.teachers if teacher.name not in missing]
    if not missing and config.teacher_cache is None and config.memory is None:
        teachers = load_teachers(setup)
        _ask(setup, teachers)
        return teachers
    for teacher in here:
        # One at a time is in memory.
        _ask(setup, load_teachers(setup, [teacher]))
    return None


def _ask(setup: Setup, teachers: LiveTeachers) -> None:
    for teacher, reads_text in zip(teachers.teachers, teachers.reads_text, strict=True):
        whose = f"teacher {teacher.name!r}"
        if not reads_text:
            check_positions(setup, whose, teacher.max_length)
        if setup.task.name == "causal-lm" and sees_later_tokens(teacher.model):
            raise UserError(
                f"{whose}: a {type(teacher.model).__name__} sees the tokens that it has to predict (its outputs change "
                "with later tokens): task 'causal-lm' needs a causal model"
            )
    rows = setup.encode(_few_rows(setup.data, setup.languages)["train"], keep_text=teachers.needs_text)
    collate = setup.collator(teachers.needs_text)
    for start in range(0, len(rows), _TRIED_ROWS):
        teachers.ask(collate([rows[i] for i in range(start, min(start + _TRIED_ROWS, len(rows)))]))()


def try_training(
    setup: Setup,
    model: PreTrainedModel,
    teachers: LiveTeachers | None,
    arguments: AMTSSTrainingArguments,
    languages: Sequence[str],
) -> None:
    """A trainer on a few rows: its own checks, and the loss of one batch."""
    trainer = make_trial(setup, model, _few_rows(setup.data, languages), teachers, arguments, languages)
    batch: Any = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad(), trainer.compute_loss_context_manager():
        trainer.compute_loss(model, prepare_inputs(trainer, batch), num_items_in_batch=torch.tensor(1))


def _few_rows(data: DatasetDict, languages: Sequence[str]) -> DatasetDict:
    """Of each split and language the longest text among the first thousands, and one more."""
    few = DatasetDict()
    for split, rows in data.items():
        codes = np.array(rows.select(range(min(4096, len(rows))))["language"])
        places: list[int] = []
        for code in languages:
            found = np.flatnonzero(codes == code)
            if len(found):
                lengths = [len(text) for text in rows.select(found)["text"]]
                places += {int(found[int(np.argmax(lengths))]), int(found[0])}
        if places:
            few[split] = rows.select(sorted(places))
    return few
