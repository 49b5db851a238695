"""An option is written once: what repeats its name agrees with `LossOptions`."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch

from amtss_fast import AMTSSLoss, LossOptions, amtss_loss, linear_amtss_loss
from amtss_fast.loss import contract, registry
from amtss_fast.loss.options import (
    DIVERGENCES,
    OPTION_NAMES,
    REDUCTIONS,
    WEIGHTINGS,
    Divergence,
    LossKeywords,
    Reduction,
    Weighting,
)

OTHERS: dict[str, Any] = {
    "temperature": 3.0,
    "weighting": "label_nll",
    "weight_temperature": 0.5,
    "kd_weight": 0.25,
    "ce_weight": 0.75,
    "label_smoothing": 0.125,
    "ignore_index": -7,
    "unlabeled_index": -8,
    "reduction": "sum",
    "divergence": "skew_reverse_kl",
    "divergence_beta": 0.25,
    "teacher_temperature": (1.5, 3.0),
}
"""A value of each option that is not its default."""


def test_every_option_is_tried_here() -> None:
    assert tuple(OTHERS) == OPTION_NAMES
    defaults = LossOptions()
    assert all(getattr(defaults, name) != value for name, value in OTHERS.items())
    assert LossOptions(**OTHERS).values(2) == tuple(OTHERS.values())


def test_keywords_are_the_fields() -> None:
    assert get_type_hints(LossKeywords) == get_type_hints(LossOptions)
    assert get_args(Weighting) == WEIGHTINGS
    assert get_args(Reduction) == REDUCTIONS
    assert get_args(Divergence) == DIVERGENCES


@pytest.mark.parametrize("function", [amtss_loss, linear_amtss_loss, AMTSSLoss])
def test_signatures_show_the_options_with_their_defaults(function: Any) -> None:
    shown = inspect.signature(function).parameters
    assert "options" not in shown
    for field in dataclasses.fields(LossOptions):
        assert shown[field.name].kind is inspect.Parameter.KEYWORD_ONLY
        assert shown[field.name].default == field.default
        assert field.metadata["help"]


@pytest.mark.parametrize("name", ["amtss_loss", "linear_amtss_loss"])
def test_operators_take_the_fields_in_order(name: str) -> None:
    arguments = getattr(torch.ops.amtss_fast, name).default._schema.arguments
    names = [argument.name for argument in arguments]
    start = names.index(OPTION_NAMES[0])
    assert tuple(names[start : start + len(OPTION_NAMES)]) == OPTION_NAMES


def test_the_c_struct_holds_the_fields() -> None:
    if (reason := registry.why_missing("cpu")) is not None:
        pytest.skip(reason)
    from amtss_fast import _cpu
    from amtss_fast.loss.backends.cpu import NOT_NATIVE

    assert tuple(_cpu.weightings) == WEIGHTINGS
    assert tuple(_cpu.divergences) == DIVERGENCES
    native = _cpu.Options()
    for name, value in OTHERS.items():
        if name not in NOT_NATIVE:
            setattr(native, name, value)
            assert getattr(native, name) == value
    with pytest.raises(AttributeError):
        native.margin = 1
    with pytest.raises(ValueError, match="weighting margin is unknown"):
        native.weighting = "margin"


@pytest.mark.parametrize("name", registry.BACKENDS)
def test_every_backend_satisfies_the_contract(name: str) -> None:
    backend = registry.find_backend(name)
    assert isinstance(backend.CHECKS_VALUES, bool)
    assert backend.scale_gradient is None or callable(backend.scale_gradient)
    assert backend.why_missing() is None or isinstance(backend.why_missing(), str)
    for method in ("why_not", "amtss_loss"):
        if not hasattr(backend, method) and backend.why_missing() is not None:
            continue
        wanted = list(inspect.signature(getattr(contract.Backend, method)).parameters)[1:]
        assert list(inspect.signature(getattr(backend, method)).parameters) == wanted


@pytest.mark.parametrize(("name", "value"), OTHERS.items())
def test_an_option_reaches_every_backend(backend: str, name: str, value: Any) -> None:
    """It changes the loss, or which labels are special, and all backends agree on how."""
    torch.manual_seed(0)
    student, teachers = torch.randn(12, 5), torch.randn(2, 12, 5)
    labels = torch.tensor([0, 1, 2, 3, 4, 0, -1, -1, -100, -100, 2, 1])
    usual = amtss_loss(student, teachers, labels, ce_weight=0.5, backend=backend)
    if name.endswith("_index"):
        labels = labels.where(labels != getattr(LossOptions(), name), value)
    options: Any = {"ce_weight": 0.5, name: value}
    if name == "divergence_beta":
        options["divergence"] = "jsd"
    loss = amtss_loss(student, teachers, labels, **options, backend=backend)
    torch.testing.assert_close(
        loss, amtss_loss(student, teachers, labels, **options, backend="reference"), rtol=1e-5, atol=1e-6
    )
    assert torch.equal(loss, usual) == name.endswith("_index")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": 0}, ValueError, "temperature must be positive and finite, got 0.0"),
        ({"temperature": "2"}, TypeError, "temperature must be a number, got '2'"),
        ({"temperature": torch.tensor(2.0)}, TypeError, "temperature must be a number"),
        ({"weighting": "margin"}, ValueError, "weighting must be one of"),
        ({"weight_temperature": math.nan}, ValueError, r"weight_temperature must be in \[0, inf\], got nan"),
        ({"kd_weight": -1}, ValueError, "kd_weight must be finite and >= 0, got -1.0"),
        ({"ce_weight": math.inf}, ValueError, "ce_weight must be finite and >= 0, got inf"),
        ({"kd_weight": 0}, ValueError, "kd_weight and ce_weight must not both be 0"),
        ({"label_smoothing": 1}, ValueError, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index must be an integer, got 1.5"),
        ({"ignore_index": -1}, ValueError, "ignore_index and unlabeled_index must differ, both are -1"),
        ({"reduction": "median"}, ValueError, "reduction must be one of"),
        ({"divergence": "kl"}, ValueError, "divergence must be one of .*, got 'kl'"),
        ({"divergence": "jsd", "divergence_beta": 1}, ValueError, r"divergence_beta must be in \(0, 1\).*, got 1.0"),
        ({"divergence": "jsd", "divergence_beta": math.nan}, ValueError, "divergence_beta must be in"),
        ({"divergence": "jsd", "divergence_beta": "0.5"}, TypeError, "divergence_beta must be a number, got '0.5'"),
        ({"divergence_beta": 0.5}, ValueError, "divergence_beta has no meaning for divergence='forward_kl', got 0.5"),
        ({"teacher_temperature": 0}, ValueError, "teacher_temperature must be positive and finite, got 0.0"),
        (
            {"teacher_temperature": [2, -1.0]},
            ValueError,
            r"teacher_temperature\[1\] must be positive and finite, got -1",
        ),
        ({"teacher_temperature": ["2"]}, TypeError, r"teacher_temperature\[0\] must be a number, got '2'"),
        ({"temprature": 2}, TypeError, "temprature"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    for function in (lambda: LossOptions(**options), lambda: AMTSSLoss(**options)):
        with pytest.raises(error, match=message):
            function()
    with pytest.raises(error, match=message):
        amtss_loss(torch.randn(2, 3), torch.randn(1, 2, 3), **options)


def test_options_cannot_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LossOptions().temperature = 3.0  # type: ignore[misc]
    # Numbers of numpy are numbers.
    assert LossOptions(temperature=np.float32(4)) == LossOptions(temperature=4)
