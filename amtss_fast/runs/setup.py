"""What the trainings of a run share: data, languages, labels, tokenizer, device, and their arguments."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from amtss_fast.data import encode, load_data, split_data, train_tokenizer
from amtss_fast.data.sources import is_hub_id
from amtss_fast.errors import UserError, user_errors
from amtss_fast.models import load_tokenizer
from amtss_fast.runs.config import RunConfig, TeacherConfig
from amtss_fast.runs.folder import RunFolder
from amtss_fast.training import AMTSSTrainingArguments, Task, find_task
from amtss_fast.training.evaluation import STUDENT


@dataclass(frozen=True)
class Setup:
    """What :func:`prepare` makes of a configuration; nothing here is reassigned."""

    config: RunConfig
    task: Task
    data: DatasetDict
    """The splits, as texts."""
    languages: list[str]
    """The student's, in the order of `language_ids`."""
    label_names: list[str]
    """The student's classes in order; empty where they are a vocabulary."""
    tokenizer: PreTrainedTokenizerBase
    """The student's."""
    device: torch.device
    resume: bool
    """Whether trainings continue from their last checkpoints."""

    @property
    def folder(self) -> RunFolder:
        """The run's folder."""
        return RunFolder(Path(self.config.output_dir))

    def encode(
        self, data: Dataset | DatasetDict, *, languages: Sequence[str] | None = None, keep_text: bool = False
    ) -> Any:
        """Rows as token ids, labels and language ids: a `Dataset` of one, a `DatasetDict` of one."""
        return encode(
            data,
            self.tokenizer,
            languages=self.languages if languages is None else languages,
            max_length=self.config.data.max_length,
            keep_text=keep_text,
        )

    def collator(self, keep_text: bool = False) -> Any:
        """What makes batches of encoded rows."""
        return self.task.collator(
            self.tokenizer,
            keep_text=keep_text,
            mask_probability=self.config.data.mask_probability,
            seed=self.config.seed,
        )

    def student_data(self) -> DatasetDict:
        """The splits with the labels of the training rows hidden as configured."""
        config = self.config
        train = self.task.hide_labels(self.data["train"], config.data.labelled_fraction, seed=config.seed)
        return DatasetDict({**self.data, "train": train})


def prepare(config: RunConfig, *, resume: bool = False) -> Setup:
    """Reads the data and loads or trains the tokenizer of a run; writes nothing.

    Args:
        config: the configuration.
        resume: whether trainings continue from their last checkpoints.

    Raises:
        UserError: what is wrong with data, tokenizer or training arguments.
    """
    task = find_task(config.task)
    device = student_arguments(config).device
    with user_errors():
        data = load_run_data(config)
        features = data["train"].features
        languages = config.data.languages or sorted(set(data["train"]["language"]))
        return Setup(
            config=config,
            task=task,
            data=data,
            languages=list(languages),
            label_names=task.label_names(features),
            tokenizer=_tokenizer(config, data["train"]),
            device=device,
            resume=resume,
        )


def load_run_data(config: RunConfig) -> DatasetDict:
    """The data of a configuration, with a validation split of its own where it asks for one."""
    options = config.data.model_dump(
        exclude={"validation_fraction", "labelled_fraction", "max_length", "mask_probability"}
    )
    if options["revision"] is None:
        del options["revision"]
    if not find_task(config.task).has_labels and options["label"] is None:
        # A table without labels needs names for them, which are unused here.
        options["label_names"] = ["text"]
    name = options.pop("name")
    for key in ("revision", "config"):
        if options.get(key) is not None and not is_hub_id(name):
            raise UserError(f"data.{key} = {options[key]!r} is for data sets on the Hub; data.name = {name!r} is none")
    data = load_data(name, **options)
    if config.data.validation_fraction and "validation" not in data:
        parts = split_data(data["train"], validation=config.data.validation_fraction, test=0, seed=config.seed)
        data = DatasetDict({**data, **parts})
    return data


def _tokenizer(config: RunConfig, train: Dataset) -> PreTrainedTokenizerBase:
    path, whose = config.tokenizer.path, "tokenizer.path"
    if path is None and isinstance(config.student.encoder, str):
        path, whose = config.student.encoder, "student.encoder"
    if path is not None:
        return load_tokenizer(path, whose=whose)
    texts = [text for column in ("text", "text_pair") if column in train.column_names for text in train[column]]
    # Lists of words are read one word at a time.
    texts = [word for text in texts for word in ([text] if isinstance(text, str) else text)]
    return train_tokenizer(texts, config.tokenizer.vocab_size, mask=config.task == "masked-lm")


def training_arguments(
    config: RunConfig, name: str, options: Mapping[str, Any], section: str = "training"
) -> AMTSSTrainingArguments:
    """The arguments of one training; its checkpoints go to a folder of its own. `section` is where they are from.

    Raises:
        UserError: an argument that does not exist or is outside its range.
    """
    defaults = {
        "task": config.task,
        "seed": config.seed,
        "dataloader_pin_memory": torch.cuda.is_available() and not options.get("use_cpu", False),
    }
    output_dir = str(RunFolder(Path(config.output_dir)).training(name))
    try:
        return AMTSSTrainingArguments(**{**defaults, **options, "output_dir": output_dir})
    except (ValueError, TypeError) as error:
        raise UserError(f"{section}: {' '.join(str(error).split())}") from error


def student_arguments(config: RunConfig) -> AMTSSTrainingArguments:
    """The arguments of the student's training."""
    return training_arguments(config, STUDENT, config.training)


def labels_only_options(config: RunConfig, n_rows: int) -> dict[str, Any]:
    """The student's training options without teachers, for as many steps as `n_rows` rows give the student."""
    student = student_arguments(config)
    per_step = student.train_batch_size * student.gradient_accumulation_steps * student.world_size
    steps = int(math.ceil(n_rows / per_step) * student.num_train_epochs)
    options = {**config.training, "kd_weight": 0.0, "ce_weight": 1.0}
    # One for each of the teachers that are not there.
    options.pop("teacher_temperature", None)
    if options.get("language_sampling") == "adaptive":
        # Without teachers there is no gap to weigh languages by.
        options["language_sampling"] = "proportional"
    options["max_steps"] = student.max_steps if student.max_steps > 0 else steps
    return options


def teacher_arguments(config: RunConfig, teacher: TeacherConfig) -> AMTSSTrainingArguments:
    """The arguments of a teacher's training, which learns from labels alone."""
    options = {**config.teacher_training, **teacher.training, "kd_weight": 0.0, "ce_weight": 1.0}
    return training_arguments(config, teacher.name, options, f"teacher_training, or training of {teacher.name!r}")
