"""The configuration of a run: its sections, their defaults, and their checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from amtss_fast.errors import UserError
from amtss_fast.models.config import ACTIVATIONS, CLASSIFIERS, POOLINGS
from amtss_fast.models.names import check_code
from amtss_fast.runs.arguments import TeacherTrainingOptions, TrainingOptions, errors_at, unknown_key
from amtss_fast.runs.paths import PathText, expand_path
from amtss_fast.runs.scalars import core_value, typed
from amtss_fast.runs.settings import apply_overrides, read_settings, shorten, write_settings
from amtss_fast.teachers import PRECISIONS

SHIPPED = Path(__file__).parent / "configs"


def _one_of(*allowed: str) -> AfterValidator:
    def check(value: str) -> str:
        if value not in allowed:
            raise UserError(f"must be one of {', '.join(allowed)}")
        return value

    return AfterValidator(check)


LanguageCode = Annotated[str, AfterValidator(check_code)]
# The trainings of a run are RUN/training/NAME; these are not of teachers.
_TRAININGS = ("student", "labels-only", "memory")


class _Section(BaseModel):
    # What follows from a setting must be finite.
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _read(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return core_value(values)
        # A misspelt key is an error, because ignoring it would change the results silently.
        unknown = [(name, value, unknown_key(name, cls.model_fields)) for name, value in values.items()]
        if unknown := [problem for problem in unknown if problem[0] not in cls.model_fields]:
            raise errors_at(unknown)
        return {name: typed(value, cls.model_fields[name].annotation) for name, value in values.items()}


class DataConfig(_Section):
    """The data set, the names of its columns, and the share of its labels that the student sees.

    `name` to `revision` are arguments of :func:`amtss_fast.data.load_data`.
    """

    name: PathText
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
    languages: list[LanguageCode] | None = Field(default=None, min_length=1)
    """The languages to read, in the order of the student's; default: all, sorted."""
    splits: list[str] | dict[str, str] | None = None
    """The splits to read, or a mapping from their new names to their names in the data set; default: all."""
    split_column: str | None = "split"
    """The column with the names of the splits, in files whose names do not give them."""
    language_default: LanguageCode | None = None
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

    path: PathText | None = None
    """A folder or Hub id; default: the encoder's, or a byte-level BPE trained on the training texts."""
    vocab_size: int = Field(default=8000, gt=300)
    """The size of the vocabulary of a tokenizer that is trained."""


class ModelConfig(_Section):
    """A model; in other tasks than sequence classification it has an encoder only."""

    encoder: Annotated[PathText | dict[str, Any], AfterValidator(core_value)]
    """A folder or Hub id; or a configuration with its `model_type`, for an encoder with random weights."""
    pooling: Annotated[str, _one_of(*POOLINGS)] = "mean"
    """How token vectors become one vector; see :class:`amtss_fast.AMTSSConfig`, as for the keys below."""
    projection_activation: Annotated[str, _one_of(*ACTIVATIONS)] = "tanh"
    classifier: Annotated[str, _one_of(*CLASSIFIERS)] = "shared"
    classifier_dropout: float = Field(default=0.1, ge=0, lt=1)


class TeacherConfig(_Section):
    """A teacher: a fine-tuned checkpoint (`path`), or one that is trained first, on labels (`model`)."""

    # It is the name of a folder and part of a key in the log.
    name: str = Field(pattern=r"^[\w.-]+$", max_length=100)
    """Its name in logs and results."""
    path: PathText | None = None
    """A folder or Hub id."""
    languages: list[LanguageCode] | None = Field(default=None, min_length=1)
    """The languages that it teaches; default: all."""
    precision: Annotated[str, _one_of(*PRECISIONS)] = "float32"
    """`float32`, `bfloat16` or `int8`."""
    engine: str | None = None
    """What runs int8; see :func:`amtss_fast.load_teacher`."""
    compile: bool = False
    """Whether `torch.compile` compiles it."""
    prior: float = Field(default=1.0, ge=0)
    """Its weight before the margins are applied, at least 0."""
    tokenizer: PathText | None = None
    """A folder or Hub id; default: the tokenizer saved with the checkpoint."""
    label_names: list[str] | None = None
    """The names of its outputs in order, if the checkpoint does not give them."""
    model: ModelConfig | None = None
    """The model to train."""
    training: TeacherTrainingOptions = {}
    """Training arguments that differ from the run's `teacher_training`."""


class CacheConfig(_Section):
    """Logits of the teachers that `amtss-fast cache` computes once and training reads."""

    path: PathText
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
    output_dir: PathText
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
    teacher_training: TeacherTrainingOptions = {}
    """Arguments of :class:`amtss_fast.AMTSSTrainingArguments` for the teachers that the run trains."""
    training: TrainingOptions = {}
    """Arguments of :class:`amtss_fast.AMTSSTrainingArguments` for the student."""
    labels_only: bool = False
    """Also train the same student, for as many steps, on its labeled rows alone."""
    seed: int = Field(default=0, ge=0, lt=2**32)
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
        for place, teacher in enumerate(self.teachers):
            name = f"teachers.{place} ({teacher.name!r})"
            if teacher.name.strip(".") == "" or teacher.name.endswith(".partial"):
                raise ValueError(f"{name}: this name cannot be that of a folder")
            if (teacher.path is None) == (teacher.model is None):
                raise ValueError(f"{name}: teacher {teacher.name!r} needs either a path or a model to train")
            if teacher.model is not None and teacher.name in _TRAININGS:
                raise ValueError(f"{name}: the run itself keeps a training under this name, choose another")
            if teacher.path is not None and teacher.training:
                raise ValueError(f"{name}: training has no effect on a teacher with a path: it is not trained here")
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

    @model_validator(mode="after")
    def _check_arguments(self) -> RunConfig:
        """Arguments of the student's training that have no effect in this run."""
        if self.training.get("kd_weight") == 0:
            raise ValueError("training.kd_weight must be above 0: the student learns from its teachers; got 0")
        temperatures = self.training.get("teacher_temperature")
        if isinstance(temperatures, list) and len(temperatures) != len(self.teachers):
            raise ValueError(
                f"training.teacher_temperature must be a number or hold one for each of {len(self.teachers)} teachers, "
                f"got {temperatures!r}"
            )
        tasks = {
            "importance_temperature": ("sequence-classification",),
            "gap_temperature": ("sequence-classification",),
            "chunk_rows": ("masked-lm", "causal-lm"),
        }
        for name, allowed in tasks.items():
            if self.training.get(name) is not None and self.task not in allowed:
                raise ValueError(
                    f"training.{name} is for {' and '.join(allowed)}, not for task {self.task!r}; "
                    f"got {self.training[name]!r}"
                )
        for name in ("activation_checkpointing", "gradient_checkpointing"):
            if self.memory is not None and self.training.get(name) is not None:
                raise ValueError(f"training.{name} has no effect: with memory.budget the plan decides it")
        if (
            self.task != "masked-lm"
            and self.data.mask_probability != DataConfig.model_fields["mask_probability"].default
        ):
            raise ValueError(
                f"data.mask_probability is for masked-lm, not for task {self.task!r}; got {self.data.mask_probability}"
            )
        return self

    def to_yaml(self) -> str:
        """The configuration as the YAML that :func:`load_config` reads."""
        return write_settings(self.model_dump())


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
    path = Path(expand_path(str(path_or_name)))
    if path.is_dir():
        raise UserError(f"{path} is a folder: give a YAML file, for that of a run {path / 'config.yaml'}")
    if not path.is_file() and path.suffix == "":
        path = SHIPPED / f"{path_or_name}.yaml"
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.yaml")))
        raise FileNotFoundError(f"no configuration {str(path_or_name)!r}: give a YAML file, or one of {shipped}")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line} is not UTF-8: {error.reason} {content[error.start : error.end]!r}"
        ) from error
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
    settings = apply_overrides(values, overrides)
    try:
        return RunConfig.model_validate(settings)
    except ValidationError as error:
        problems: dict[str, list[str]] = {}
        for found in error.errors():
            key = ".".join(_place(settings, found["loc"], found["type"]))
            problems.setdefault(f"{key}: " if key else "", []).append(problem(**found))
        lines = [f"{key}{' or '.join(messages)}" for key, messages in problems.items()]
        if len(lines) == 1:
            raise UserError(f"{origin} is not a valid configuration: {lines[0]}") from error
        raise UserError("\n  ".join([f"{origin} is not a valid configuration:", *lines])) from error


def _place(settings: Any, loc: Sequence[int | str], kind: str) -> list[str]:
    """The key that an error is about: its place without the alternatives of a type, which pydantic adds."""
    names: list[str] = []
    for step in loc:
        inside = isinstance(settings, Mapping) and step in settings
        if not inside and not (isinstance(settings, list) and isinstance(step, int)):
            if isinstance(settings, Mapping) and kind == "missing":
                names.append(str(step))
            break
        names.append(str(step))
        settings = settings[step]
    return names


def problem(msg: str, type: str, input: Any, ctx: Mapping[str, Any] | None = None, **_: Any) -> str:
    """What is wrong with a value, and the value, from the fields of one of pydantic's errors."""
    if type == "missing":
        return "is missing"
    if type in ("dict_type", "model_type", "model_attributes_type"):
        msg = "must be a section (a mapping of keys to values)"
    # A whole section would hide the message.
    found = "" if isinstance(input, Mapping) else f", got {shorten(repr(input))}"
    if type == "value_error" and ctx is not None:
        msg = str(ctx["error"])
        found = "" if ", got " in msg else found
    if type == "string_type" and isinstance(input, (Mapping, list)):
        msg += "; a text with such characters needs quotes"
    return f"{msg}{found}"
