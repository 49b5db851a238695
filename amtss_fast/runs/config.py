"""The YAML file of a run: its sections, their defaults, and their checks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

SHIPPED = Path(__file__).parent / "configs"


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 2e-5 for a string; here it is the number that it looks like."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


class _Section(BaseModel):
    # A misspelt key is an error, never a setting that silently does nothing.
    model_config = ConfigDict(extra="forbid")


class DataConfig(_Section):
    """What to read, as in :func:`amtss_fast.data.load.load_data`, and how much of it is labelled."""

    name: str
    """An embedded set, `xnli`, a file or folder, or a Hub id."""
    text: str | None = None
    text_pair: str | None = None
    label: str | None = "label"
    language: str | None = "language"
    label_names: list[str] | None = None
    languages: list[str] | None = None
    splits: list[str] | dict[str, str] | None = None
    split_column: str | None = "split"
    language_default: str | None = None
    config: str | None = None
    revision: str | None = None
    validation_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Taken from the training split where there is no validation split."""
    labelled_fraction: float = Field(default=1.0, gt=0, le=1)
    """The share of the training rows whose label the student sees; the others become -1."""
    max_length: int = Field(default=128, gt=2)
    mask_probability: float = Field(default=0.15, gt=0, lt=1)
    """The share of the tokens that a masked language model has to predict."""


class TokenizerConfig(_Section):
    """Of student and fresh teachers: a folder or Hub id, or a byte-level BPE made from the training texts."""

    path: str | None = None
    vocab_size: int = Field(default=8000, gt=300)


class ModelConfig(_Section):
    """A model on an encoder: of a folder or Hub id, or fresh, from a configuration with its `model_type`.

    Models of tokens have nothing but their encoder.
    """

    encoder: str | dict[str, Any]
    pooling: str = "mean"
    projection_activation: str = "tanh"
    classifier: str = "shared"
    classifier_dropout: float = 0.1


class TeacherConfig(_Section):
    """A teacher: a fine-tuned checkpoint (`path`), or one to train first on the labels of its languages (`model`)."""

    # It names a folder and a place in the log.
    name: str = Field(pattern=r"^[\w.-]+$")
    path: str | None = None
    languages: list[str] | None = None
    precision: str = "float32"
    """`float32`, `bfloat16` or `int8`."""
    engine: str | None = None
    """What runs int8; see :func:`amtss_fast.load_teacher`."""
    compile: bool = False
    prior: float = 1.0
    tokenizer: str | None = None
    label_names: list[str] | None = None
    model: ModelConfig | None = None
    training: dict[str, Any] = {}
    """`AMTSSTrainingArguments` that differ from the run's `teacher_training`."""


class CacheConfig(_Section):
    """Teachers' logits computed once by `amtss-fast cache` and read in training."""

    path: str
    """A folder; several runs may share it."""
    format: Literal["float32", "bfloat16", "codes"] | None = None
    """Default: float32 up to 64 classes, 8-bit codes above."""
    shard_rows: int = Field(default=8192, gt=0)
    batch_size: int = Field(default=64, gt=0)


class MemoryConfig(_Section):
    """How much memory the student's training may take."""

    budget: str | float
    """`6GB`, `800MB`, `2GiB`, or `auto`: what is free now. Of the process, or of an accelerator's memory."""
    approximate: bool = True
    """Whether teachers may be loaded in bfloat16 or int8 where nothing exact fits."""


class RunConfig(_Section):
    """One run: data, teachers, student, and the folder that it leaves."""

    task: Literal["sequence-classification", "token-classification", "masked-lm", "causal-lm"] = (
        "sequence-classification"
    )
    title: str | None = None
    """What the report calls the run; default: the task."""
    output_dir: str
    data: DataConfig
    student: ModelConfig
    teachers: list[TeacherConfig] = Field(min_length=1)
    """At least one; their names differ."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    teachers_resident: int | None = Field(default=None, gt=0)
    """How many teachers lie on the GPU at a time, the others waiting in the CPU's memory; default: all."""
    teacher_cache: CacheConfig | None = None
    """Train from cached logits, which `amtss-fast cache` computes; default: ask the teachers in each step."""
    memory: MemoryConfig | None = None
    """Choose micro-batch, gradient checkpointing, chunk and the teachers' precision so that training stays below."""
    teacher_training: dict[str, Any] = {}
    training: dict[str, Any] = {}
    labels_only: bool = False
    """Also train the same student, for as many steps, on its labelled rows alone."""
    seed: int = 0

    @model_validator(mode="after")
    def _check_teachers(self) -> RunConfig:
        names = [teacher.name for teacher in self.teachers]
        if len(set(names)) < len(names):
            raise ValueError(f"teachers must have different names, got {names}")
        for name in ("teacher_cache", "teachers_resident"):
            if self.task != "sequence-classification" and getattr(self, name) is not None:
                raise ValueError(f"{name} is for sequence-classification, not for task {self.task!r}")
        in_8_bits = [teacher.name for teacher in self.teachers if teacher.precision == "int8"]
        if self.teachers_resident is not None and in_8_bits:
            raise ValueError(
                f"teachers_resident moves teachers in float32 and bfloat16, {', '.join(in_8_bits)} is in int8"
            )
        if self.task != "sequence-classification":
            models = [self.student, *(teacher.model for teacher in self.teachers if teacher.model is not None)]
            useless = sorted(
                {
                    name
                    for model in models
                    for name, field in ModelConfig.model_fields.items()
                    if name != "encoder" and getattr(model, name) != field.default
                }
            )
            if useless:
                raise ValueError(f"task {self.task!r} has no use for {', '.join(useless)}: models have an encoder only")
        if self.task in ("masked-lm", "causal-lm") and self.data.labelled_fraction != 1:
            raise ValueError(
                f"data.labelled_fraction hides labels, task {self.task!r} has none; got {self.data.labelled_fraction}"
            )
        for teacher in self.teachers:
            if (teacher.path is None) == (teacher.model is None):
                raise ValueError(f"teacher {teacher.name!r} needs either a path or a model to train")
        return self


def load_config(path_or_name: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file, or a shipped one by name, and applies `key=value` overrides (`training.num_train_epochs=2`).

    Raises:
        FileNotFoundError: neither a file nor a shipped name.
        ValueError: an unknown key, a missing key or a value of the wrong type; the message names each.
    """
    path = Path(path_or_name)
    if not path.is_file() and path.suffix == "":
        path = SHIPPED / f"{path_or_name}.yaml"
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.yaml")))
        raise FileNotFoundError(f"no configuration {str(path_or_name)!r}: give a YAML file, or one of {shipped}")
    values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping, found {type(values).__name__}")
    return parse_config(values, overrides, str(path))


def parse_config(values: dict[str, Any], overrides: Sequence[str], origin: str) -> RunConfig:
    """A configuration from nested mappings, which the overrides change; raises as :func:`load_config`."""
    for override in overrides:
        _override(values, override)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        problems = "\n".join(
            f"  {'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" for e in error.errors()
        )
        raise ValueError(f"{origin} is not a valid configuration:\n{problems}") from error


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"an override must be key=value, got {override!r}")
    *parents, last = key.split(".")
    place: Any = values
    for depth, name in enumerate(parents):
        if isinstance(place, list):
            place = _item(place, name, override)
        elif isinstance(place, dict):
            place = place.setdefault(name, {})
        if not isinstance(place, (dict, list)):
            raise ValueError(f"{override!r}: {'.'.join(parents[: depth + 1])} is {place!r}, not a section")
    if isinstance(place, list):
        _item(place, last, override)
        place[int(last)] = yaml.load(text, _Loader)
    else:
        place[last] = yaml.load(text, _Loader)


def _item(place: list[Any], name: str, override: str) -> Any:
    if not name.isdigit() or int(name) >= len(place):
        raise ValueError(f"{override!r}: {name!r} must be a place in a list of {len(place)}, from 0")
    return place[int(name)]
