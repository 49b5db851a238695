"""The training sections of a configuration: types and ranges of the arguments, and those that a run does not read.

What depends on the machine (16 bits, devices) is checked when :class:`amtss_fast.AMTSSTrainingArguments` are made of a
section, which is when its run starts: a configuration can be read on every machine.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from functools import cache, partial
from typing import Annotated, Any, get_type_hints

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, create_model
from pydantic_core import InitErrorDetails, PydanticCustomError

from amtss_fast.data import check_sampling
from amtss_fast.loss import LossOptions
from amtss_fast.loss.adaptive import check_adaptive_options
from amtss_fast.loss.options import OPTION_NAMES
from amtss_fast.runs.paths import expand_path
from amtss_fast.runs.scalars import Written, core_value, typed
from amtss_fast.training.arguments import AMTSSTrainingArguments

_STAGES = "a run trains, evaluates and predicts by itself"
_HUB = "nothing is pushed to a hub; push the folder RUN/student when the run is finished"
_METRICS = "the metrics of a task need labels and languages alone"
# Arguments of the stock trainer that a run sets itself, or that have no effect in it.
_REFUSED = {
    "output_dir": "checkpoints are kept in RUN/training; the key output_dir of the run says where RUN is",
    "resume_from_checkpoint": "`--resume` continues from the last checkpoint of the run",
    "do_train": _STAGES,
    "do_eval": _STAGES,
    "do_predict": _STAGES,
    "label_names": "the trainer knows the columns of the labels; the names of the classes are data.label_names",
    "task": "the task is a key of the run",
    "local_rank": "torchrun and accelerate set it",
    "include_for_metrics": _METRICS,
    "length_column_name": "rows have no column of lengths, they are measured",
    "parallelism_config": "it is an object of Python, which no text gives",
    **dict.fromkeys(
        (
            "push_to_hub",
            "hub_token",
            "hub_private_repo",
            "hub_model_id",
            "hub_strategy",
            "hub_always_push",
            "hub_revision",
        ),
        _HUB,
    ),
    "batch_eval_metrics": "metrics are of all evaluated rows together",
}
_DISTILS = "teachers learn from labels alone, so that it would have no effect"
_NOT_FOR_TEACHERS = dict.fromkeys(
    (
        "temperature",
        "weighting",
        "weight_temperature",
        "kd_weight",
        "ce_weight",
        "divergence",
        "divergence_beta",
        "teacher_temperature",
        "importance_temperature",
        "gap_temperature",
    ),
    _DISTILS,
)
_LARGEST_SEED = 2**32 - 1
# The least and the largest value; what the loss and the stock arguments check themselves is not here.
_RANGES: dict[str, tuple[float, float]] = {
    "per_device_train_batch_size": (1, math.inf),
    "per_device_eval_batch_size": (1, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "eval_accumulation_steps": (1, math.inf),
    "torch_empty_cache_steps": (1, math.inf),
    "save_total_limit": (1, math.inf),
    "dataloader_num_workers": (0, math.inf),
    "dataloader_prefetch_factor": (1, math.inf),
    "chunk_rows": (1, math.inf),
    "ddp_timeout": (1, math.inf),
    "ddp_bucket_cap_mb": (1, math.inf),
    "seed": (0, _LARGEST_SEED),
    "data_seed": (0, _LARGEST_SEED),
    "learning_rate": (0, math.inf),
    "weight_decay": (0, math.inf),
    "warmup_steps": (0, math.inf),
    "eval_delay": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "neftune_noise_alpha": (0, math.inf),
    "adam_epsilon": (0, math.inf),
}
_ABOVE_0 = ("num_train_epochs", "logging_steps", "eval_steps", "save_steps")
_BELOW_1 = ("adam_beta1", "adam_beta2", "label_smoothing_factor")
_MAY_BE_INFINITE = ("max_grad_norm", "weight_temperature", "importance_temperature", "gap_temperature")
_FILES = ("deepspeed", "accelerator_config", "fsdp_config")


@cache
def _types() -> type[BaseModel]:
    """A model with the names and types of `AMTSSTrainingArguments`."""
    hints = get_type_hints(AMTSSTrainingArguments)
    # It is declared for HfArgumentParser, which reads one type per argument.
    hints["teacher_temperature"] = float | list[float] | None
    names = [field.name for field in dataclasses.fields(AMTSSTrainingArguments) if field.init]
    fields: Any = {name: (hints[name], None) for name in names}
    settings = ConfigDict(arbitrary_types_allowed=True, use_enum_values=True, protected_namespaces=())
    return create_model("TrainingArguments", __config__=settings, **fields)


@cache
def _choices() -> dict[str, list[str]]:
    """The words that an argument may be."""
    hints = get_type_hints(AMTSSTrainingArguments)
    choices = {}
    for field in dataclasses.fields(AMTSSTrainingArguments):
        kinds = getattr(hints[field.name], "__args__", (hints[field.name],))
        words = [str(k.value) for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum) for k in kind]
        if words := words or [*map(str, field.metadata.get("choices") or ())]:
            choices[field.name] = words
    return choices


def _check(values: Any, refused: Mapping[str, str]) -> dict[str, Any]:
    """The arguments of a section, each as what it is; raises ValidationError with the name of each that is wrong."""
    if not isinstance(values, Mapping):
        raise PydanticCustomError("section", "must be a section: arguments with their values")
    types = _types()
    problems: list[tuple[str, Any, str]] = []
    for name, value in values.items():
        if name in refused:
            problems.append((name, value, f"is not for a configuration: {refused[name]}"))
        elif name not in types.model_fields:
            allowed = [known for known in types.model_fields if known not in refused]
            problems.append((name, value, unknown_key(name, allowed)))
    _raise(problems)
    given = {name: _typed(name, value, types.model_fields[name].annotation) for name, value in values.items()}
    checked = types.model_validate(given).model_dump(exclude_unset=True)
    for name, value in checked.items():
        if (problem := _problem(name, value, checked)) is not None:
            problems.append((name, value, problem))
    _raise(problems)
    return checked


TrainingOptions = Annotated[dict[str, Any], BeforeValidator(partial(_check, refused=_REFUSED))]
TeacherTrainingOptions = Annotated[
    dict[str, Any], BeforeValidator(partial(_check, refused=_REFUSED | _NOT_FOR_TEACHERS))
]


def unknown_key(name: str, allowed: Iterable[str]) -> str:
    """The message about a key that does not exist."""
    close = difflib.get_close_matches(name, list(allowed), n=1)
    return "unknown key" + (f", did you mean {close[0]}?" if close else "")


def errors_at(problems: Iterable[tuple[str, Any, str]]) -> ValidationError:
    """An error with a message about each key: (key, value, message)."""
    details = [
        InitErrorDetails(type=PydanticCustomError("setting", "{text}", {"text": text}), loc=(name,), input=value)
        for name, value, text in problems
    ]
    return ValidationError.from_exception_data("settings", details)


def _raise(problems: list[tuple[str, Any, str]]) -> None:
    if problems:
        raise errors_at(problems)


def _typed(name: str, value: Any, hint: Any) -> Any:
    value = typed(value, hint)
    if name in _FILES and isinstance(value, str) and not value.startswith("{"):
        return expand_path(value)
    if isinstance(value, Mapping):
        return core_value(value)
    return str(value) if isinstance(value, Written) else value


def _problem(name: str, value: Any, section: Mapping[str, Any]) -> str | None:
    """What is wrong with the value of an argument of a section, or None."""
    if isinstance(value, list):
        return _refused_by_loss(name, value, section)
    if isinstance(value, str):
        words = _choices().get(name)
        return None if words is None or value in words else f"must be one of {', '.join(words)}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if math.isnan(value) or (math.isinf(value) and name not in _MAY_BE_INFINITE):
        return "must be a finite number"
    if isinstance(value, int) and abs(value) >= 2**63:
        return "is too large"
    least, most = _RANGES.get(name, (-math.inf, math.inf))
    if not least <= value <= most:
        return f"must be at least {least:g}" + ("" if math.isinf(most) else f" and at most {most:.0f}")
    if name in _ABOVE_0 and value <= 0:
        return "must be above 0"
    if name in _BELOW_1 and not 0 <= value < 1:
        return "must be at least 0 and below 1"
    if name == "max_steps" and value < 1 and value != -1:
        return "must be at least 1; leave it out (or -1) to train for num_train_epochs"
    return _refused_by_loss(name, value, section)


def _refused_by_loss(name: str, value: Any, section: Mapping[str, Any]) -> str | None:
    """What the loss and its strategies say about one option."""
    checks: dict[str, Callable[[], object]] = {
        "importance_temperature": lambda: check_adaptive_options(value, None),
        "gap_temperature": lambda: check_adaptive_options(None, value),
        "language_sampling_exponent": lambda: check_sampling("temperature", value),
    }
    if name in OPTION_NAMES:
        # Not both weights may be 0, and a beta belongs to a divergence.
        others: dict[str, Any] = {{"ce_weight": "kd_weight"}.get(name, "ce_weight"): 1.0}
        if name == "divergence_beta":
            others["divergence"] = section.get("divergence", LossOptions.divergence)
        checks[name] = lambda: LossOptions(**others | {name: value})
    if name in checks:
        try:
            checks[name]()
        except ValueError as error:
            return str(error).partition(", got")[0].partition("; got")[0].removeprefix(f"{name} ")
    return None
