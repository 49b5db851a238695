"""The options of the loss. Each is written here once: its default, its range and its help.

The public functions take them as keywords, everything below passes one :class:`LossOptions`. The operators' schemas and
the training arguments are made from its fields, and a test holds the C++ struct against them.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias, TypedDict, TypeVar, get_args

import torch

Weighting: TypeAlias = Literal["label_margin", "top2_margin", "label_nll"]
Reduction: TypeAlias = Literal["mean", "sum", "none"]
Divergence: TypeAlias = Literal["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"]

WEIGHTINGS: tuple[str, ...] = get_args(Weighting)
REDUCTIONS: tuple[str, ...] = get_args(Reduction)
DIVERGENCES: tuple[str, ...] = get_args(Divergence)
DEFAULT_BETA = {"jsd": 0.5, "skew_forward_kl": 0.1, "skew_reverse_kl": 0.1}
"""The default of `divergence_beta` for the divergences that have one."""

IGNORE_INDEX = -100
"""The label of rows that are dropped, as in torch and transformers."""
UNLABELED_INDEX = -1
"""The label of rows that have none: they are distilled all the same."""

LEAST_TEMPERATURE, LARGEST_TEMPERATURE = 1e-18, 1e18
"""Its square, a factor of the loss, is a float32 that is neither 0 nor infinite."""
LEAST_BETA = 2.0**-20
"""The mixtures of `divergence_beta` and 1 - `divergence_beta` are computed in float32."""
_LARGEST = torch.finfo(torch.float32).max

_Function = TypeVar("_Function", bound=Callable[..., Any])


class LossKeywords(TypedDict, total=False):
    """The fields of :class:`LossOptions` as keywords of a public function; a test holds the two together."""

    temperature: float
    weighting: Weighting
    weight_temperature: float
    kd_weight: float
    ce_weight: float
    label_smoothing: float
    ignore_index: int
    unlabeled_index: int
    reduction: Reduction
    divergence: Divergence
    divergence_beta: float | None
    teacher_temperature: float | Sequence[float] | None


@dataclass(frozen=True)
class LossOptions:
    """What :func:`amtss_fast.amtss_loss` computes, apart from its tensors; checked when it is made.

    Raises:
        TypeError: a value of another type.
        ValueError: a value outside its range.
    """

    temperature: float = field(default=2.0, metadata={"help": "Temperature of student and teachers, > 0."})
    weighting: Weighting = field(default="label_margin", metadata={"help": "Margin that weighs the teachers."})
    weight_temperature: float = field(
        default=1.0, metadata={"help": "In [0, inf]: 0 takes the max-margin teacher alone, inf ignores margins."}
    )
    kd_weight: float = field(default=1.0, metadata={"help": "Weight of the distillation term, >= 0."})
    ce_weight: float = field(default=0.0, metadata={"help": "Weight of the labels' cross entropy, >= 0."})
    label_smoothing: float = field(default=0.0, metadata={"help": "Of the cross entropy, in [0, 1)."})
    ignore_index: int = field(default=IGNORE_INDEX, metadata={"help": "The label of rows that are dropped."})
    unlabeled_index: int = field(default=UNLABELED_INDEX, metadata={"help": "The label of rows that have none."})
    reduction: Reduction = field(default="mean", metadata={"help": 'Over the rows: "mean", "sum" or "none".'})
    divergence: Divergence = field(default="forward_kl", metadata={"help": "Divergence of teachers and student."})
    divergence_beta: float | None = field(
        default=None, metadata={"help": "Beta of jsd (default: 0.5) and of the skewed KLs (default: 0.1), in (0, 1)."}
    )
    teacher_temperature: float | Sequence[float] | None = field(
        default=None, metadata={"help": "Of all teachers, or one for each. Default: the temperature of the student."}
    )

    def __post_init__(self) -> None:
        for name in _FLOATS:
            object.__setattr__(self, name, _as_float(name, getattr(self, name)))
        for name in ("ignore_index", "unlabeled_index"):
            if not isinstance(getattr(self, name), (int, numbers.Integral)):
                raise TypeError(f"{name} must be an integer, got {getattr(self, name)!r}")
            if not -(2**63) <= getattr(self, name) < 2**63:
                raise ValueError(f"{name} must fit 64 bits, got {getattr(self, name)}")
        _check_temperature("temperature", self.temperature)
        self._set_teacher_temperature()
        self._set_beta()
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"weighting must be one of {WEIGHTINGS}, got {self.weighting!r}")
        if not self.weight_temperature >= 0:
            raise ValueError(f"weight_temperature must be in [0, inf], got {self.weight_temperature}")
        for name in ("kd_weight", "ce_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and >= 0, got {getattr(self, name)}")
            factor = max(1.0, self.temperature**2) if name == "kd_weight" else 1.0
            # Sums are in float32, where an infinite factor would make NaN of finite logits.
            if getattr(self, name) > _LARGEST / factor:
                raise ValueError(f"{name} must be at most {_LARGEST / factor:.3g}, got {getattr(self, name)}")
        if self.kd_weight == 0 and self.ce_weight == 0:
            raise ValueError("kd_weight and ce_weight must not both be 0")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {REDUCTIONS}, got {self.reduction!r}")
        if self.ignore_index == self.unlabeled_index:
            raise ValueError(f"ignore_index and unlabeled_index must differ, both are {self.ignore_index}")

    def _set_teacher_temperature(self) -> None:
        given = self.teacher_temperature
        if given is None:
            return
        if isinstance(given, (list, tuple)):
            values = tuple(_as_float(f"teacher_temperature[{k}]", value) for k, value in enumerate(given))
            for k, value in enumerate(values):
                _check_temperature(f"teacher_temperature[{k}]", value)
            object.__setattr__(self, "teacher_temperature", values)
            return
        value = _as_float("teacher_temperature", given)
        _check_temperature("teacher_temperature", value)
        object.__setattr__(self, "teacher_temperature", value)

    def _set_beta(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence must be one of {DIVERGENCES}, got {self.divergence!r}")
        beta = self.divergence_beta
        if beta is None:
            beta = DEFAULT_BETA.get(self.divergence)
        elif self.divergence not in DEFAULT_BETA:
            raise ValueError(f"divergence_beta has no meaning for divergence={self.divergence!r}, got {beta!r}")
        else:
            beta = _as_float("divergence_beta", beta)
            if not LEAST_BETA <= beta <= 1 - LEAST_BETA:
                allowed = f"(0, 1), at least {LEAST_BETA} away from both"
                raise ValueError(f"divergence_beta must be in {allowed}, got {beta}")
        object.__setattr__(self, "divergence_beta", beta)

    def teacher_temperatures(self, n_teachers: int) -> tuple[float, ...]:
        """The temperature of each teacher; ValueError where there is one for each of another number of teachers."""
        given = self.teacher_temperature
        if isinstance(given, tuple):
            if len(given) != n_teachers:
                raise ValueError(
                    f"teacher_temperature must be a number or hold one for each of {n_teachers} teachers, "
                    f"got {len(given)}"
                )
            return given
        return (self.temperature if given is None else given,) * n_teachers  # type: ignore[return-value]

    def keywords(self) -> dict[str, Any]:
        """The fields by name, as the public functions take them."""
        return {name: getattr(self, name) for name in OPTION_NAMES}

    def values(self, n_teachers: int) -> tuple[Any, ...]:
        """The fields in order, as the operators take them: with one temperature for each of `n_teachers`, or None."""
        values = [getattr(self, name) for name in OPTION_NAMES]
        if self.teacher_temperature is not None:
            values[OPTION_NAMES.index("teacher_temperature")] = self.teacher_temperatures(n_teachers)
        return tuple(values)


OPTION_NAMES: tuple[str, ...] = tuple(f.name for f in fields(LossOptions))
_FLOATS = tuple(f.name for f in fields(LossOptions) if f.type == "float")

# By type too: 1.0 is no integer, though it equals 1.
_remembered = functools.lru_cache(maxsize=1024, typed=True)(LossOptions)


def _as_float(name: str, value: Any) -> float:
    if not isinstance(value, (float, int, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite, got an integer that no float holds") from None


def _check_temperature(name: str, value: float) -> None:
    # Written so that NaN is wrong too.
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
    if not LEAST_TEMPERATURE <= value <= LARGEST_TEMPERATURE:
        raise ValueError(f"{name} must be in [{LEAST_TEMPERATURE}, {LARGEST_TEMPERATURE}], got {value}")


def make_options(keywords: LossKeywords) -> LossOptions:
    """The options of a call. In a loop they are the same at each step: checked once, then remembered."""
    if isinstance(keywords.get("teacher_temperature"), list):
        keywords = {**keywords, "teacher_temperature": tuple(keywords["teacher_temperature"])}  # type: ignore[arg-type]
    # What cannot be remembered, a list say, is no option: its error names it.
    remembers = not torch.compiler.is_compiling() and all(isinstance(value, Hashable) for value in keywords.values())
    return _remembered(**keywords) if remembers else LossOptions(**keywords)


def shows_options(function: _Function) -> _Function:
    """Lets `inspect.signature` and `help` show the options in the place of the `**options` that `function` takes."""
    signature = inspect.signature(function)
    kept = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    options = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in fields(LossOptions)
    ]
    function.__signature__ = signature.replace(parameters=[*kept, *options])  # type: ignore[attr-defined]
    return function
