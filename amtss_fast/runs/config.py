"""The configuration of a run: its sections, their defaults, and their checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from omegaconf import OmegaConf
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator
from pydantic_core import PydanticCustomError

from amtss_fast.errors import UserError, user_errors
from amtss_fast.runs.settings import apply_overrides, read_settings
from amtss_fast.training.arguments import AMTSSTrainingArguments

SHIPPED = Path(__file__).parent / "configs"


@cache
def _argument_types() -> type[BaseModel]:
    """A model with the names and types of `AMTSSTrainingArguments`."""
    types = get_type_hints(AMTSSTrainingArguments)
    names = [field.name for field in dataclasses.fields(AMTSSTrainingArguments) if field.init]
    fields: Any = {name: (types[name], None) for name in names}
    return create_model("TrainingArguments", __config__=ConfigDict(arbitrary_types_allowed=True), **fields)


def _check_arguments(values: dict[str, Any]) -> dict[str, Any]:
    """Training arguments in which each text has become what its argument is: `no` is False for a boolean."""
    types = _argument_types()
    for name in values:
        if name not in types.model_fields:
            raise PydanticCustomError("unknown_argument", "unexpected keyword argument '{name}'", {"name": name})
    texts = {name: value for name, value in values.items() if isinstance(value, str)}
    return values | types.model_validate(texts).model_dump(exclude_unset=True)


TrainingOptions = Annotated[dict[str, Any], AfterValidator(_check_arguments)]


class _Section(BaseModel):
    # A misspelt key is an error, because ignoring it would change the results silently.
    model_config = ConfigDict(extra="forbid")


class DataConfig(_Section):
    """The data set, the names of its columns, and the share of its labels that the student sees.

    `name` to `revision` are arguments of :func:`amtss_fast.data.load_data`.
    """

    name: str
    """An embedded data set, `xnli`, a file or folder, or a Hub id."""
    text: str | None = None
    """The column of the texts; default: `text`, or else `premise` with `hypothesis` as second text."""
    text_pair: str | None = None
    """The column of second texts."""
    label: str | None = "label"
    """The column of the labels; None for texts without labels, which need `label_names`."""
    language: str | None = "language"
    """The column of the language codes."""
    label_names: list[str] | None = None
    """The names of the classes in order; default: those of the data, sorted."""
    languages: list[str] | None = None
    """The languages to read, in the order of the student's; default: all, sorted."""
    splits: list[str] | dict[str, str] | None = None
    """The splits to read, or a mapping from their new names to their names in the data set; default: all."""
    split_column: str | None = "split"
    """The column with the names of the splits, in files whose names do not give them."""
    language_default: str | None = None
    """The language of rows without a language code."""
    config: str | None = None
    """The configuration of a data set on the Hub."""
    revision: str | None = None
    """The revision of a data set on the Hub."""
    validation_fraction: float = Field(default=0.0, ge=0, lt=1)
    """The share of the training split that becomes the validation split if there is none."""
    labelled_fraction: float = Field(default=1.0, gt=0, le=1)
    """The share of the training rows whose labels the student sees; the other labels become -1."""
    max_length: int = Field(default=128, gt=2)
    """The most tokens per row; longer texts are cut."""
    mask_probability: float = Field(default=0.15, gt=0, lt=1)
    """The share of the tokens that a masked language model has to predict."""


class TokenizerConfig(_Section):
    """The tokenizer of the student and of the teachers that the run trains."""

    path: str | None = None
    """A folder or Hub id; default: the encoder's, or a byte-level BPE trained on the training texts."""
    vocab_size: int = Field(default=8000, gt=300)
    """The size of the vocabulary of a tokenizer that is trained."""


class ModelConfig(_Section):
    """A model; in other tasks than sequence classification it has an encoder only."""

    encoder: str | dict[str, Any]
    """A folder or Hub id; or a configuration with its `model_type`, for an encoder with random weights."""
    pooling: str = "mean"
    """How token vectors become one vector; see :class:`amtss_fast.AMTSSConfig`, as for the keys below."""
    projection_activation: str = "tanh"
    classifier: str = "shared"
    classifier_dropout: float = 0.1


class TeacherConfig(_Section):
    """A teacher: a fine-tuned checkpoint (`path`), or one that is trained first, on labels (`model`)."""

    # It is the name of a folder and part of a key in the log.
    name: str = Field(pattern=r"^[\w.-]+$")
    """Its name in logs and results."""
    path: str | None = None
    """A folder or Hub id."""
    languages: list[str] | None = None
    """The languages that it teaches; default: all."""
    precision: str = "float32"
    """`float32`, `bfloat16` or `int8`."""
    engine: str | None = None
    """What runs int8; see :func:`amtss_fast.load_teacher`."""
    compile: bool = False
    """Whether `torch.compile` compiles it."""
    prior: float = 1.0
    """Its weight before the margins are applied, at least 0."""
    tokenizer: str | None = None
    """A folder or Hub id; default: the tokenizer saved with the checkpoint."""
    label_names: list[str] | None = None
    """The names of its outputs in order, if the checkpoint does not give them."""
    model: ModelConfig | None = None
    """The model to train."""
    training: TrainingOptions = {}
    """Training arguments that differ from the run's `teacher_training`."""


class CacheConfig(_Section):
    """Logits of the teachers that `amtss-fast cache` computes once and training reads."""

    path: str
    """A folder, which several runs may share."""
    format: Literal["float32", "bfloat16", "codes"] | None = None
    """Default: float32 up to 64 classes, 8-bit codes above."""
    shard_rows: int = Field(default=8192, gt=0)
    """Rows per file."""
    batch_size: int = Field(default=64, gt=0)
    """Rows per forward pass of a teacher."""


class MemoryConfig(_Section):
    """How much memory the training of the student may use."""

    budget: str | float
    """`6GB`, `800MB`, `2GiB`, a number of bytes, or `auto` (what is free now): memory of the process, or of its GPU."""
    approximate: bool = True
    """Whether teachers may be loaded in bfloat16 or int8 if nothing exact fits."""


class RunConfig(_Section):
    """A run: its data, teachers, student and output folder."""

    task: Literal["sequence-classification", "token-classification", "masked-lm", "causal-lm"] = (
        "sequence-classification"
    )
    title: str | None = None
    """The title of the report; default: the task."""
    output_dir: str
    """The folder of the run."""
    data: DataConfig
    student: ModelConfig
    teachers: list[TeacherConfig] = Field(min_length=1)
    """At least one; their names differ."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    teachers_resident: int | None = Field(default=None, gt=0)
    """How many teachers are on the GPU at a time; the others are in CPU memory. Default: all are on the GPU."""
    teacher_cache: CacheConfig | None = None
    """Train from cached logits; default: run the teachers in each step."""
    memory: MemoryConfig | None = None
    """Choose micro-batch, gradient checkpointing, chunk size and the teachers' precision to fit into a budget."""
    teacher_training: TrainingOptions = {}
    """Arguments of :class:`amtss_fast.AMTSSTrainingArguments` for the teachers that the run trains."""
    training: TrainingOptions = {}
    """Arguments of :class:`amtss_fast.AMTSSTrainingArguments` for the student."""
    labels_only: bool = False
    """Also train the same student, for as many steps, on its labeled rows alone."""
    seed: int = 0
    """The seed of weights, data order and hidden labels."""

    @model_validator(mode="after")
    def _check_teachers(self) -> RunConfig:
        names = [teacher.name for teacher in self.teachers]
        if len(set(names)) < len(names):
            raise ValueError(f"teachers must have different names, got {names}")
        in_8_bits = [teacher.name for teacher in self.teachers if teacher.precision == "int8"]
        if self.teachers_resident is not None and in_8_bits:
            raise ValueError(
                f"teachers_resident moves teachers in float32 and bfloat16, {', '.join(in_8_bits)} is in int8"
            )
        for teacher in self.teachers:
            if (teacher.path is None) == (teacher.model is None):
                raise ValueError(f"teacher {teacher.name!r} needs either a path or a model to train")
        return self

    @model_validator(mode="after")
    def _check_task(self) -> RunConfig:
        if self.task == "sequence-classification":
            return self
        for name in ("teacher_cache", "teachers_resident"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} is for sequence-classification, not for task {self.task!r}")
        models = [self.student, *(teacher.model for teacher in self.teachers if teacher.model is not None)]
        if useless := sorted({name for model in models for name in _changed_head_settings(model)}):
            raise ValueError(f"task {self.task!r} has no use for {', '.join(useless)}: models have an encoder only")
        if self.task in ("masked-lm", "causal-lm") and self.data.labelled_fraction != 1:
            raise ValueError(
                f"data.labelled_fraction hides labels, task {self.task!r} has none; got {self.data.labelled_fraction}"
            )
        return self

    def to_yaml(self) -> str:
        """The configuration as the YAML that :func:`load_config` reads."""
        return OmegaConf.to_yaml(OmegaConf.create(self.model_dump()))


def _changed_head_settings(model: ModelConfig) -> list[str]:
    return [
        name
        for name, field in ModelConfig.model_fields.items()
        if name != "encoder" and getattr(model, name) != field.default
    ]


def load_config(path_or_name: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a configuration and applies overrides.

    Args:
        path_or_name: a YAML file, or a shipped configuration by name.
        overrides: `key=value`, see :func:`amtss_fast.runs.settings.apply_overrides`.

    Raises:
        FileNotFoundError: neither a file nor a shipped name.
        UserError: no YAML, an unknown key, a missing key, or a value that is not allowed; the message names each.
    """
    path = Path(path_or_name)
    if not path.is_file() and path.suffix == "":
        path = SHIPPED / f"{path_or_name}.yaml"
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.yaml")))
        raise FileNotFoundError(f"no configuration {str(path_or_name)!r}: give a YAML file, or one of {shipped}")
    with user_errors():
        text = path.read_text(encoding="utf-8")
    return parse_config(read_settings(text, str(path)), overrides, str(path))


def parse_config(values: Mapping[str, Any], overrides: Sequence[str], origin: str) -> RunConfig:
    """A configuration from nested mappings and overrides.

    Args:
        values: the sections by name; not changed.
        overrides: `key=value`, see :func:`amtss_fast.runs.settings.apply_overrides`.
        origin: where the values are from, for messages.

    Raises:
        UserError: as :func:`load_config`.
    """
    try:
        return RunConfig.model_validate(apply_overrides(values, overrides))
    except ValidationError as error:
        problems = "\n".join(_problem(**found) for found in error.errors())
        raise UserError(f"{origin} is not a valid configuration:\n{problems}") from error


def _problem(loc: Sequence[int | str], msg: str, input: Any, **_: Any) -> str:
    # A whole section would hide the message.
    found = "" if isinstance(input, Mapping) else f", got {input!r}"
    return f"  {'.'.join(map(str, loc))}: {msg}{found}"
