"""A new language for the student of a finished run, without moving the others."""

from __future__ import annotations

import copy
import json
import math
import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset, DatasetDict, concatenate_datasets
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, set_seed

from amtss_fast._system.files import write_atomically
from amtss_fast.data.load import DistillationCollator, encode, keep_labels, split_data
from amtss_fast.loss import amtss_loss
from amtss_fast.models.student import AMTSSForSequenceClassification, load_tokenizer
from amtss_fast.runs.config import RunConfig, load_config, parse_config
from amtss_fast.runs.report import write_report
from amtss_fast.runs.run import load_run_data, nest
from amtss_fast.teachers.teacher import TeacherPool, load_teacher
from amtss_fast.training.evaluation import STUDENT, TEACHER, evaluate
from amtss_fast.training.trainer import AMTSSTrainer, AMTSSTrainingArguments

NEAREST, MEAN = "nearest", "mean"
# Rows that the nearest language is found on.
_NEAREST_ROWS = 1024
# A projection of a few hundred rows needs its own pace, not the one of the whole student.
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

    The new projection is trained on labelled rows, on rows without a label (distilled), or both. Encoder, shared
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

    Data without a split to test on gives up a fifth of its labelled rows for it. Unless set otherwise, training takes
    at least 200 steps, and without `replay` its learning rate is 1e-3. Without a teacher of this language the labels
    alone teach.

    Raises:
        FileNotFoundError: no finished run there.
        FileExistsError: the new folder exists.
        ValueError: a language that exists, labels that differ, nothing to learn from; what data and loss find wrong.
    """
    run = Path(run)
    if not (run / "config.yaml").is_file() or not (run / STUDENT).is_dir():
        raise FileNotFoundError(f"{run} holds no finished run: it needs config.yaml and {STUDENT}/")
    base = load_config(run / "config.yaml")
    student = AMTSSForSequenceClassification.from_pretrained(run / STUDENT)
    tokenizer = load_tokenizer(run / STUDENT)
    config = _configuration(base, run, code, overrides, student.config.label_names)
    folder = Path(config.output_dir)
    _check_target(folder, overwrite)

    old_languages = list(student.config.languages)
    data = _data(config, code, student.config.label_names, rows)
    encoded = _encoded(data, tokenizer, config, [*old_languages, code])
    source: str | None = like
    if like == NEAREST:
        source = _nearest(student, tokenizer, encoded["train"], config)
    elif like == MEAN:
        source = None
    if own_classifier:
        student.split_classifier()
    student.add_language(code, like=source)
    before = copy.deepcopy(student)

    pool = _pool(config, run, student, tokenizer, None if replay else code)
    asked = {override.partition("=")[0] for override in overrides}
    options = _training(config, encoded["train"], "validation" in encoded, pool, code, replay, asked)
    # A teacher may read the texts with a tokenizer of its own.
    keep_text = pool is not None and pool.needs_text
    old = load_run_data(base) if replay else None
    train = _encoded(data, tokenizer, config, student.config.languages, keep_text)
    if old is not None:
        seen = old["train"].filter(lambda language: language != code, input_columns="language")
        seen = keep_labels(seen, base.data.labelled_fraction, seed=base.seed)
        seen = _encoded(DatasetDict(train=seen), tokenizer, config, student.config.languages, keep_text)["train"]
        train["train"] = concatenate_datasets([train["train"], seen.cast(train["train"].features)])
    else:
        student.freeze_all_but(code)
    if overwrite and folder.is_dir():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    set_seed(config.seed)
    trainer = AMTSSTrainer(
        student,
        AMTSSTrainingArguments(**{**options, "output_dir": str(folder / "training" / STUDENT)}),
        teachers=pool,
        train_dataset=train["train"],
        eval_dataset=train.get("validation"),
        data_collator=DistillationCollator(tokenizer, keep_text=keep_text),
        processing_class=tokenizer,
    )
    trainer.train()
    if not trainer.is_world_process_zero():
        return folder
    student.requires_grad_(True)
    partial = folder / f"{STUDENT}.partial"
    trainer.save_model(str(partial))
    os.replace(partial, folder / STUDENT)

    name = f"before {code}"
    results = _before_and_after(base, config, tokenizer, data, code, {STUDENT: student, name: before}, pool)
    lines = [json.dumps(nest(entry), ensure_ascii=False) for entry in trainer.state.log_history]
    write_atomically(folder / "log.jsonl", "\n".join(lines) + "\n")
    kept = _kept_configuration(base, config, run, code)
    write_atomically(folder / "config.yaml", yaml.safe_dump(kept.model_dump(), sort_keys=False, allow_unicode=True))
    metrics = {
        "task": f"{base.task}, {code} added",
        "languages": list(student.config.languages),
        "label_names": student.config.label_names,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "started_like": source or MEAN,
        "test": results,
        "config": kept.model_dump(),
    }
    write_atomically(folder / "metrics.json", json.dumps(metrics, indent=1, ensure_ascii=False))
    write_report(folder)
    return folder


def _configuration(
    base: RunConfig, run: Path, code: str, overrides: Sequence[str], label_names: Sequence[str]
) -> RunConfig:
    """The run's configuration with the data of the new language in the place of its own."""
    values = base.model_dump()
    values["output_dir"] = str(run.with_name(f"{run.resolve().name}-{code}"))
    others = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if key == "data" and equals:
            values["data"] = {"name": value, "label_names": list(label_names), "max_length": base.data.max_length}
        else:
            others.append(override)
    values["data"]["languages"] = [code]
    return parse_config(values, others, f"the configuration of {run} for {code}")


def _check_target(folder: Path, overwrite: bool) -> None:
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite or not (folder / "config.yaml").is_file():
        raise FileExistsError(f"{folder} is not empty: choose another output_dir=, or --overwrite a run")


def _data(config: RunConfig, code: str, label_names: Sequence[str], rows: int | None) -> DatasetDict:
    data = load_run_data(config)
    names = data["train"].features["label"].names
    if list(names) != list(label_names):
        raise ValueError(f"the labels of the new texts must be the student's {list(label_names)}, got {list(names)}")
    train = data["train"]
    labelled = [i for i, label in enumerate(train["label"]) if label >= 0]
    if "test" not in data and "validation" not in data and len(labelled) >= 5:
        parts = split_data(train.select(labelled), validation=0, test=0.2, seed=config.seed)
        unlabelled = train.filter(lambda label: label < 0, input_columns="label")
        data = DatasetDict(train=concatenate_datasets([parts["train"], unlabelled]), test=parts["test"])
    if rows is not None:
        if rows < 1:
            raise ValueError(f"rows must be at least 1, got {rows}")
        shuffled = data["train"].shuffle(seed=config.seed)
        data["train"] = shuffled.select(range(min(rows, len(shuffled))))
    data["train"] = keep_labels(data["train"], config.data.labelled_fraction, seed=config.seed)
    return data


def _encoded(
    data: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    languages: Sequence[str],
    keep_text: bool = False,
) -> DatasetDict:
    encoded = encode(data, tokenizer, languages=languages, max_length=config.data.max_length, keep_text=keep_text)
    assert isinstance(encoded, DatasetDict)
    return encoded


@torch.inference_mode()
def _nearest(
    student: AMTSSForSequenceClassification, tokenizer: PreTrainedTokenizerBase, rows: Dataset, config: RunConfig
) -> str:
    """The language whose projection gives the largest mean margin; rows without a label count with their top two."""
    student.eval()
    rows = rows.shuffle(seed=config.seed).select(range(min(_NEAREST_ROWS, len(rows))))
    languages = student.config.languages
    sums = torch.zeros(len(languages))
    for batch in DataLoader(rows, batch_size=64, collate_fn=DistillationCollator(tokenizer)):
        labels = batch.pop("labels")
        for language in range(len(languages)):
            batch["language_ids"] = torch.full_like(labels, language)
            logits = student(**batch).logits.float()
            _, stats = amtss_loss(
                logits,
                logits.unsqueeze(0),
                labels,
                return_stats=True,
            )
            sums[language] += stats.student_margin.sum()
    return languages[int(sums.argmax())]


def _pool(
    config: RunConfig,
    run: Path,
    student: AMTSSForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    only: str | None,
) -> TeacherPool | None:
    """The run's teachers, or those of one language; None if there is none."""
    teachers = []
    options = {"name", "languages", "precision", "engine", "compile", "prior", "tokenizer", "label_names"}
    for teacher in config.teachers:
        source = teacher.path or run / "teachers" / teacher.name
        if only is not None and teacher.languages is not None and only not in teacher.languages:
            continue
        loaded = load_teacher(source, **teacher.model_dump(include=options))
        if only is None or loaded.teaches(only):
            teachers.append(loaded)
    if not teachers:
        return None
    return TeacherPool(
        teachers, label_names=student.config.label_names, languages=student.config.languages, tokenizer=tokenizer
    )


def _training(
    config: RunConfig,
    train: Dataset,
    validated: bool,
    pool: TeacherPool | None,
    code: str,
    replay: bool,
    asked: set[str],
) -> dict[str, Any]:
    """The run's training arguments, with what few rows of one language need."""
    options: dict[str, Any] = {"seed": config.seed, **config.training}
    if pool is None:
        if not any(label >= 0 for label in train["labels"]):
            raise ValueError(f"nothing to learn from: no row has a label, and no teacher teaches {code}")
        options |= {"kd_weight": 0.0, "ce_weight": 1.0}
    if not validated:
        options |= {"eval_strategy": "no", "load_best_model_at_end": False, "save_strategy": "no"}
    if replay:
        if "language_sampling" not in options:
            options |= {"language_sampling": "temperature", "train_sampling_strategy": "random"}
        return options
    options.pop("language_sampling", None)
    if "training.learning_rate" not in asked:
        options["learning_rate"] = _LEARNING_RATE
    if options.get("max_steps", -1) <= 0 and "training.num_train_epochs" not in asked:
        shape = AMTSSTrainingArguments(**{**options, "output_dir": "."})
        per_step = shape.train_batch_size * shape.gradient_accumulation_steps * shape.world_size
        options["max_steps"] = max(_STEPS, math.ceil(len(train) / per_step * shape.num_train_epochs))
    return options


def _before_and_after(
    base: RunConfig,
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    data: DatasetDict,
    code: str,
    students: dict[str, AMTSSForSequenceClassification],
    pool: TeacherPool | None,
) -> dict[str, Any]:
    languages = students[STUDENT].config.languages
    keep_text = pool is not None and pool.needs_text
    tests = {}
    for name, source in (("new", data), ("old", load_run_data(base))):
        split = "test" if "test" in source else "validation"
        if split in source:
            rows = source[split]
            if name == "old":
                rows = rows.filter(lambda language: language != code, input_columns="language")
            tests[name] = _encoded(DatasetDict(test=rows), tokenizer, config, languages, keep_text)["test"]
    if not tests:
        raise ValueError("neither the new texts nor the run's have a test or validation split to report on")
    features = next(iter(tests.values())).features
    results = evaluate(concatenate_datasets([part.cast(features) for part in tests.values()]), tokenizer, students)
    teachers = [] if pool is None else [teacher for teacher in pool.teachers if teacher.teaches(code)]
    if teachers and "new" in tests and any(label >= 0 for label in tests["new"]["labels"]):
        names = students[STUDENT].config.label_names
        pool = TeacherPool(teachers, label_names=names, languages=languages, tokenizer=tokenizer)
        of_teachers = evaluate(tests["new"], tokenizer, {STUDENT: students[STUDENT]}, pool)
        results |= {name: result for name, result in of_teachers.items() if name.startswith(TEACHER)}
    return results


def _kept_configuration(base: RunConfig, config: RunConfig, run: Path, code: str) -> RunConfig:
    """What the new folder is a run of: the old data, with the new language where the data set has it."""
    values = base.model_dump()
    values["output_dir"] = config.output_dir
    values["training"] = config.training
    if config.data.name == base.data.name and values["data"]["languages"] is not None:
        values["data"]["languages"] = [*values["data"]["languages"], code]
    for teacher in values["teachers"]:
        if teacher["path"] is None:
            teacher |= {"path": str(run / "teachers" / teacher["name"]), "model": None}
    return RunConfig.model_validate(values)
