"""The recipe that adds a language to the student of a finished run, without changing the other languages' outputs."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from torch.utils.data import DataLoader
from transformers import set_seed

from amtss_fast.data import align_labels, keep_labels, split_data
from amtss_fast.errors import UserError, user_errors
from amtss_fast.loss import amtss_loss
from amtss_fast.models import AMTSSForSequenceClassification, check_code, load_tokenizer
from amtss_fast.runs.build import load_teachers, taught_languages, train
from amtss_fast.runs.config import RunConfig, load_config, parse_config
from amtss_fast.runs.folder import RunFolder
from amtss_fast.runs.preflight import try_training
from amtss_fast.runs.report import write_report
from amtss_fast.runs.results import machine, report_split
from amtss_fast.runs.setup import Setup, load_run_data, student_arguments, training_arguments
from amtss_fast.teachers import LiveTeachers, Teachers
from amtss_fast.training import AMTSSTrainer, evaluate, find_task
from amtss_fast.training.evaluation import STUDENT, TEACHER

NEAREST, MEAN = "nearest", "mean"
# Rows that the nearest language is found on.
_NEAREST_ROWS = 1024
# A projection that is trained alone on few rows needs more steps and a larger rate than a whole student.
_STEPS, _LEARNING_RATE = 200, 1e-3


def add_language(
    run: str | Path,
    code: str,
    overrides: Sequence[str] = (),
    *,
    like: str = NEAREST,
    own_classifier: bool = False,
    replay: bool = False,
    rows: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Adds a language to the student of a run; returns the new run folder, by default `RUN-CODE` beside it.

    The new projection is trained on labeled rows, on rows without a label (distilled), or both. Encoder, shared
    classifier and all other projections are frozen, so that the logits of the other languages keep their bits; with
    `replay` the whole student is trained on a mix of the run's data and the new rows. The folder has the report of a
    run, on the test rows of all languages, before and after.

    Args:
        run: the folder of a finished run; it is left as it is.
        code: the new language.
        overrides: `data=FILE` for its texts (default: the run's data set in this language), and `key=value` settings of
            the run's configuration, where `data` is that of the new texts: `data.label=null` for texts without labels,
            `data.language_default=CODE` where no column and no file name gives the language.
        like: "nearest" copies the projection of the language through which the student has the largest mean margin on
            the new texts, "mean" takes the mean of all; or a language.
        own_classifier: gives each language a classifier of its own, first a copy of the shared one.
        replay: see above.
        rows: the most training rows; default: all.
        overwrite: replaces a run that is already in the new folder.

    Data without a split to test on gives up a fifth of its labeled rows for it. Unless set otherwise, training takes
    at least 200 steps, and without `replay` its learning rate is 1e-3. Without a teacher of this language only the
    labels teach.

    Raises:
        FileNotFoundError: no finished run there.
        FileExistsError: the new folder exists.
        UserError: a language that exists, labels that differ, nothing to learn from; wrong data or options.
    """
    old = RunFolder(Path(run))
    if not old.is_finished:
        raise FileNotFoundError(f"{run} holds no finished run: it needs config.yaml and student/")
    base = load_config(old.config)
    check_code(code)
    student = AMTSSForSequenceClassification.from_pretrained(old.student)
    with user_errors():
        setup = _setup(base, old, student, code, overrides)
        target = setup.folder
        target.check(overwrite=overwrite)
        # A run that is overwritten stays until the new one is complete.
        folder = target.working(overwrite=overwrite, resume=False)
        setup = replace(setup, config=setup.config.model_copy(update={"output_dir": str(folder.path)}))
        setup = _with_rows(setup, rows)
        source = _source(setup, student, like, code)
        if own_classifier:
            student.split_classifier()
        student.add_language(code, like=source)
    setup = replace(setup, languages=list(student.config.languages))
    before = copy.deepcopy(student)
    known = _known_rows(base, code)
    teachers = _teachers(setup, old, None if replay else code)

    asked = {override.partition("=")[0] for override in overrides}
    options = _training_options(setup, teachers, code, replay, asked)
    # A teacher may read the texts with a tokenizer of its own.
    keep_text = teachers is not None and teachers.needs_text
    encoded = setup.encode(setup.data, keep_text=keep_text)
    if replay:
        seen = keep_labels(known["train"], base.data.labelled_fraction, seed=base.seed)
        seen = setup.encode(seen, keep_text=keep_text)
        encoded["train"] = concatenate_datasets([encoded["train"], seen.cast(encoded["train"].features)])
    else:
        student.freeze_all_but(code)
    kept = _kept_configuration(base, setup.config, old, code)
    kept = kept.model_copy(update={"output_dir": str(target.path)})
    arguments = training_arguments(setup.config, STUDENT, options)
    try_training(setup, copy.deepcopy(student), teachers, arguments, setup.languages)
    folder.open(kept, overwrite=overwrite)
    set_seed(setup.config.seed)
    trainer = AMTSSTrainer(
        student,
        arguments,
        teachers=teachers,
        train_dataset=encoded["train"],
        eval_dataset=encoded.get("validation"),
        data_collator=setup.collator(keep_text),
        processing_class=setup.tokenizer,
    )
    train(setup, trainer)
    folder.keep_model(trainer, folder.student)
    if not trainer.is_world_process_zero():
        return target.path
    student.requires_grad_(True)

    results = _before_and_after(setup, known, code, {STUDENT: student, f"before {code}": before}, teachers)
    folder.write_log(trainer.state.log_history)
    metrics = {
        "task": f"{base.task}, {code} added",
        "languages": setup.languages,
        "label_names": setup.label_names,
        "machine": machine(),
        "started_like": source or MEAN,
        "test": results,
        "config": kept.model_dump(),
    }
    folder.write_metrics(metrics)
    write_report(folder.path)
    folder.take_place_of(target)
    return target.path


def _setup(
    base: RunConfig, old: RunFolder, student: AMTSSForSequenceClassification, code: str, overrides: Sequence[str]
) -> Setup:
    """The run with the data of the new language in the place of its own, and with the languages that it has so far."""
    label_names = student.config.label_names
    values = base.model_dump()
    values["output_dir"] = str(old.path.with_name(f"{old.path.resolve().name}-{code}"))
    others = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if key == "data" and equals:
            values["data"] = {"name": value, "label_names": list(label_names), "max_length": base.data.max_length}
        else:
            others.append(override)
    values["data"]["languages"] = [code]
    # The new texts may lack a class, or have names in another order.
    values["data"]["label_names"] = values["data"]["label_names"] or list(label_names)
    config = parse_config(values, others, f"the configuration of {old.path} for {code}")
    task = find_task(config.task)
    data = align_labels(load_run_data(config), label_names)
    return Setup(
        config=config,
        task=task,
        data=data,
        languages=list(student.config.languages),
        label_names=label_names,
        tokenizer=load_tokenizer(old.student),
        device=student_arguments(config).device,
        resume=False,
    )


def _with_rows(setup: Setup, rows: int | None) -> Setup:
    """With a split to test on, and at most so many training rows, labels hidden as configured."""
    data, config = DatasetDict(setup.data), setup.config
    labeled = [i for i, label in enumerate(data["train"]["label"]) if label >= 0]
    if report_split(setup.task, data) is None and len(labeled) >= 5:
        parts = split_data(data["train"].select(labeled), validation=0, test=0.2, seed=config.seed)
        unlabeled = data["train"].filter(lambda label: label < 0, input_columns="label")
        data = DatasetDict(train=concatenate_datasets([parts["train"], unlabeled]), test=parts["test"])
    if rows is not None:
        if rows < 1:
            raise UserError(f"rows must be at least 1, got {rows}")
        shuffled = data["train"].shuffle(seed=config.seed)
        data["train"] = shuffled.select(range(min(rows, len(shuffled))))
    data["train"] = keep_labels(data["train"], config.data.labelled_fraction, seed=config.seed)
    return replace(setup, data=data)


def _source(setup: Setup, student: AMTSSForSequenceClassification, like: str, code: str) -> str | None:
    """The language whose projection is copied; None: the mean of all."""
    if like != NEAREST:
        return None if like == MEAN else like
    return _nearest(setup, student, setup.encode(setup.data["train"], languages=[*setup.languages, code]))


@torch.inference_mode()
def _nearest(setup: Setup, student: AMTSSForSequenceClassification, rows: Dataset) -> str:
    """The language whose projection gives the largest mean margin; rows without a label count with their top two."""
    student.eval()
    rows = rows.shuffle(seed=setup.config.seed).select(range(min(_NEAREST_ROWS, len(rows))))
    sums = torch.zeros(len(setup.languages))
    for batch in DataLoader(rows, batch_size=64, collate_fn=setup.collator()):
        labels = batch.pop("labels")
        for language in range(len(setup.languages)):
            batch["language_ids"] = torch.full_like(labels, language)
            logits = student(**batch).logits.float()
            _, stats = amtss_loss(logits, logits.unsqueeze(0), labels, return_stats=True)
            sums[language] += stats.student_margin.sum()
    return setup.languages[int(sums.argmax())]


def _known_rows(base: RunConfig, code: str) -> DatasetDict:
    """The run's own data, without rows of the new language."""
    data = load_run_data(base)
    return DatasetDict(
        {
            split: rows.filter(lambda language: language != code, input_columns="language")
            for split, rows in data.items()
        }
    )


def _teachers(setup: Setup, old: RunFolder, only: str | None) -> LiveTeachers | None:
    """The run's teachers, or those of one language; None if there is none."""
    here = [
        teacher.model_copy(update={"path": teacher.path or str(old.teacher(teacher.name)), "model": None})
        for teacher in setup.config.teachers
    ]
    chosen = [teacher for teacher in here if only is None or only in taught_languages(setup, teacher)]
    return load_teachers(setup, chosen) if chosen else None


def _training_options(
    setup: Setup, teachers: Teachers | None, code: str, replay: bool, asked: set[str]
) -> dict[str, Any]:
    """The run's training arguments, with what few rows of one language need."""
    config, train_rows = setup.config, setup.data["train"]
    options: dict[str, Any] = {"seed": config.seed, **config.training}
    if isinstance(options.get("teacher_temperature"), list):
        # Not all of the run's teachers teach this language.
        of = dict(zip((teacher.name for teacher in config.teachers), options["teacher_temperature"], strict=True))
        options["teacher_temperature"] = None if teachers is None else [of[name] for name in teachers.names]
    if teachers is None:
        if not any(label >= 0 for label in train_rows["label"]):
            raise UserError(f"nothing to learn from: no row has a label, and no teacher teaches {code}")
        options |= {"kd_weight": 0.0, "ce_weight": 1.0}
    if "validation" not in setup.data:
        options |= {"eval_strategy": "no", "load_best_model_at_end": False, "save_strategy": "no"}
    if replay:
        if "language_sampling" not in options:
            options |= {"language_sampling": "temperature", "train_sampling_strategy": "random"}
        return options
    options.pop("language_sampling", None)
    if "training.learning_rate" not in asked:
        options["learning_rate"] = _LEARNING_RATE
    if options.get("max_steps", -1) <= 0 and "training.num_train_epochs" not in asked:
        shape = training_arguments(config, STUDENT, options)
        per_step = shape.train_batch_size * shape.gradient_accumulation_steps * shape.world_size
        options["max_steps"] = max(_STEPS, math.ceil(len(train_rows) / per_step * shape.num_train_epochs))
    return options


def _before_and_after(
    setup: Setup, known: DatasetDict, code: str, students: dict[str, Any], teachers: LiveTeachers | None
) -> dict[str, Any]:
    """Scores on the test rows of all languages, and the teachers' on those of the new one; empty without test rows."""
    keep_text = teachers is not None and teachers.needs_text
    tests = {}
    for name, source in (("new", setup.data), ("old", known)):
        split = report_split(setup.task, source)
        if split is not None:
            tests[name] = setup.encode(source[split], keep_text=keep_text)
    if not tests:
        return {}
    features = next(iter(tests.values())).features
    rows = concatenate_datasets([part.cast(features) for part in tests.values()])
    collator = setup.collator(keep_text)
    results = evaluate(setup.task, rows, collator, students, setup.languages)
    own = [] if teachers is None else [teacher for teacher in teachers.teachers if teacher.teaches(code)]
    if own and "new" in tests and any(label >= 0 for label in tests["new"]["labels"]):
        pool = setup.task.teachers(
            own, label_names=setup.label_names, languages=setup.languages, tokenizer=setup.tokenizer
        )
        scores = evaluate(setup.task, tests["new"], collator, {}, setup.languages, pool)
        results |= {name: result for name, result in scores.items() if name.startswith(TEACHER)}
    return results


def _kept_configuration(base: RunConfig, config: RunConfig, old: RunFolder, code: str) -> RunConfig:
    """The configuration of the new folder: the old data, with the new language where the data set has it."""
    values = base.model_dump()
    values["output_dir"] = config.output_dir
    values["training"] = dict(config.training)
    if isinstance(config.training.get("teacher_temperature"), list):
        # One for each of the old teachers, which are kept.
        values["training"]["teacher_temperature"] = base.training.get("teacher_temperature")
    if config.data.name == base.data.name and values["data"]["languages"] is not None:
        values["data"]["languages"] = [*values["data"]["languages"], code]
    for teacher in values["teachers"]:
        if teacher["path"] is None:
            teacher |= {"path": str(old.teacher(teacher["name"])), "model": None, "training": {}}
    return RunConfig.model_validate(values)
