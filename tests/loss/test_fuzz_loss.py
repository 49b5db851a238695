"""Random calls of every public function of the loss: a right result, or an error that names the argument."""

from __future__ import annotations

import math
from typing import Any

import fuzz
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import IGNORED, UNLABELED, Case, assert_parts_within_budget
from torch import Tensor

from amtss_fast import (
    AdaptiveStrategy,
    AMTSSLoss,
    AMTSSStats,
    LossOptions,
    QuantizedLogits,
    QuantizedWeight,
    amtss_loss,
    linear_amtss_loss,
    quantize_logits,
    quantize_weight,
)
from amtss_fast.loss import registry
from amtss_fast.loss.options import OPTION_NAMES, REDUCTIONS, WEIGHTINGS

INF, NAN = math.inf, math.nan
WRONG = (ValueError, TypeError, RuntimeError)
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = [name for name in ("cpu", "reference") if registry.why_missing(name) is None]


# Tensors.


@st.composite
def strided(draw: st.DrawFn, tensor: Tensor) -> Tensor:
    """The tensor [N, C] with other strides; expanded ones have fewer values."""
    n, c = tensor.shape
    match draw(st.sampled_from(["as it is"] * 4 + ["rows", "columns", "transposed", "slice", "one row", "one column"])):
        case "rows":
            return torch.cat([tensor, tensor], 1)[:, :c]
        case "columns":
            return tensor.repeat_interleave(2, 1)[:, ::2]
        case "transposed":
            return tensor.t().contiguous().t()
        case "slice":
            return torch.cat([tensor[:1], tensor], 0)[-n:] if n else tensor
        case "one row" if n:
            return tensor[:1].expand(n, c)
        case "one column":
            return tensor[:, :1].expand(n, c)
    return tensor


def numbers(g: torch.Generator, n: int, c: int, spread: float) -> Tensor:
    return spread * torch.randn(n, c, generator=g)


def finite(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """The logits in `dtype`; what would be infinite is the largest finite number."""
    range_ = torch.finfo(torch.float32 if dtype == torch.float64 else dtype)
    clamped = logits.double().clamp(range_.min, range_.max)
    return clamped.masked_fill(logits == -INF, -INF).to(dtype)


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    kd = draw(st.sampled_from([0.0, 0.7, 1.0]))
    return {
        "temperature": draw(st.sampled_from([0.5, 1.0, 2.0, 3.7, 10.0])),
        "weighting": draw(st.sampled_from(WEIGHTINGS)),
        "weight_temperature": draw(st.sampled_from([0.0, 0.1, 1.0, INF])),
        "kd_weight": kd,
        "ce_weight": draw(st.sampled_from([0.0, 0.4])) if kd else 1.0,
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
        "reduction": draw(st.sampled_from(REDUCTIONS)),
    }


@st.composite
def row_inputs(draw: st.DrawFn, g: torch.Generator, n: int, c: int, k: int) -> tuple[Tensor | None, dict[str, Any]]:
    """Labels, and some of mask, prior, weights and number of items."""
    labels = torch.randint(c, (n,), generator=g)
    if draw(st.booleans()):
        labels[2::7] = IGNORED
        labels[1::3] = UNLABELED
    if draw(st.booleans()):
        labels = labels.repeat_interleave(2)[::2]
    extras: dict[str, Any] = {}
    if draw(st.booleans()):
        extras["teacher_mask"] = torch.rand(k, n, generator=g) < 0.6
    if draw(st.booleans()):
        shape = draw(st.sampled_from([(k,), (k, n)]))
        dtype = draw(st.sampled_from([torch.float32, torch.float64]))
        extras["teacher_prior"] = (torch.rand(shape, generator=g) * (torch.rand(shape, generator=g) < 0.8)).to(dtype)
    if draw(st.booleans()):
        extras["sample_weight"] = torch.rand(n, generator=g) * (torch.rand(n, generator=g) < 0.8)
    return (None if draw(st.integers(0, 7)) == 0 else labels), extras


@st.composite
def cases(draw: st.DrawFn, spreads: tuple[float, ...] = (0.0, 1e-30, 0.3, 2.0, 20.0), masked: bool = True) -> Case:
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n, c, k = draw(st.integers(0, 24)), draw(st.integers(2, 70)), draw(st.integers(1, 9))
    dtype = draw(st.sampled_from([*FLOATS, torch.float64]))
    spread = draw(st.sampled_from(spreads))
    common = numbers(g, n, c, 1.0)
    student = draw(strided(finite(spread * (common + numbers(g, n, c, 1.0)).double(), dtype)))
    teachers: list[Tensor | QuantizedLogits] = []
    for _ in range(k):
        logits = finite(spread * (common + numbers(g, n, c, 1.0)).double(), torch.float32)
        if masked and draw(st.integers(0, 3)) == 0:
            # The first class stays: a row of -inf throughout is NaN.
            logits[:, 1:] = logits[:, 1:].masked_fill(torch.rand(n, c - 1, generator=g) < 0.2, -INF)
        kind = draw(st.sampled_from([*FLOATS, torch.float64, None]))
        teachers.append(quantize_logits(logits) if kind is None else draw(strided(finite(logits, kind))))
    # With a larger spread a probability may be 0 in float32 alone, and its product with -inf too.
    if masked and spread <= 2 and draw(st.integers(0, 5)) == 0:
        student = student.clone()
        student[:, 1:] = student[:, 1:].masked_fill(torch.rand(n, c - 1, generator=g) < 0.1, -INF)
    labels, extras = draw(row_inputs(g, n, c, k))
    chosen = draw(options())
    if chosen["reduction"] == "mean" and draw(st.integers(0, 3)) == 0:
        extras["num_items"] = draw(st.sampled_from([3, 0.5, torch.tensor(7), torch.tensor([2.5])]))
    return Case(student, teachers, labels, chosen | extras)


# Right results.


def tied(case: Case, stats: AMTSSStats) -> bool:
    """Whether two margins of a row are so close that float32 may choose another teacher than float64."""
    if case.options["weight_temperature"] != 0 or len(case.teachers) == 1 or not stats.margins.numel():
        return False
    best, second = stats.margins.topk(2, 0).values
    return bool(((best - second).abs() < 1e-4 * (1 + best.abs())).any())


def units(case: Case, stats: AMTSSStats) -> dict[str, float]:
    """The size of what each part adds up: rounding errors are measured against it where the sum is smaller."""
    o, n = case.options, len(case.student)
    tau, beta = o["temperature"], o["weight_temperature"]
    finite = [t[t.isfinite()].abs().max().item() if t.isfinite().any() else 0.0 for t in (stats.kd, stats.margins)]
    sharp = max(1.0, finite[1] / beta) if 0 < beta < INF else 1.0
    row = sharp * (o["kd_weight"] * tau**2 * max(1.0, finite[0]) + o["ce_weight"])
    items = float(o.get("num_items", 1.0))
    total = {"mean": n / min(items, n or 1), "sum": n, "none": 1}[o["reduction"]]
    slope = sharp * (o["kd_weight"] * tau + o["ce_weight"]) / (min(items, 1.0) if o["reduction"] == "mean" else 1.0)
    return {"loss": row * total, "grad": slope, "weights": sharp, "margins": 1.0, "kd": 1.0, "student_margin": 1.0}


def runs(case: Case) -> list[str | None]:
    """The backends that take the tensors; None is the choice of the library."""
    chosen: list[str | None] = [None, "reference"]
    tensors = [case.student, *(t for t in case.teachers if isinstance(t, Tensor))]
    return chosen if any(t.dtype == torch.float64 for t in tensors) else [*chosen, *BACKENDS]


def check(case: Case, backend: str | None) -> None:
    exact, plain, got = case.exact(), case.run("reference").parts(), case.run(backend)
    parts, wanted = got.parts(), exact.parts()
    if tied(case, exact.stats):
        parts = {name: parts[name] for name in ("margins", "kd", "student_margin")}
    size = max(
        (
            float(t.nan_to_num(0, 0, 0).abs().max())
            for t in (case.student.double(), *map(dense, case.teachers))
            if len(t)
        ),
        default=0.0,
    )
    assert_parts_within_budget(parts, wanted, plain, size / case.options["temperature"], units(case, exact.stats))


def dense(teacher: Tensor | QuantizedLogits) -> Tensor:
    return teacher.dequantize().double() if isinstance(teacher, QuantizedLogits) else teacher.double()


@given(cases())
def test_any_call(case: Case) -> None:
    for backend in runs(case):
        check(case, backend)
    module = AMTSSLoss(**{name: case.options[name] for name in OPTION_NAMES if name in case.options})
    tensors = {name: value for name, value in case.options.items() if name not in OPTION_NAMES}
    teachers = list(case.teachers)
    loss = module(case.student, teachers, case.labels, **tensors)
    torch.testing.assert_close(
        loss, amtss_loss(case.student, teachers, case.labels, **case.options), rtol=0, atol=0, equal_nan=True
    )
    fuzz.outcome("amtss_loss, AMTSSLoss")


@pytest.mark.skipif(registry.why_missing("triton") is not None, reason="Triton is missing")
@settings(max_examples=8)  # Triton's interpreter takes seconds for one.
@given(cases(spreads=(0.3, 2.0)))
def test_a_few_calls_of_triton(case: Case) -> None:
    tensors = [case.student, *case.teachers]
    tensors = [t.float() if isinstance(t, Tensor) and t.dtype == torch.float64 else t for t in tensors]
    case = Case(tensors[0], tensors[1:], case.labels, case.options)
    check(case.to("cuda" if torch.cuda.is_available() else "cpu"), "triton")
    fuzz.outcome("amtss_loss, Triton")


LARGE = (1e4, 1e30, 3e38)


@given(cases(spreads=LARGE, masked=False), st.sampled_from([None, NAN, INF, -INF]), st.integers(-1, 8))
def test_finite_logits_never_give_nan(case: Case, special: float | None, who: int) -> None:
    """However large they are. A NaN, an infinity or a row of -inf spoils its own row only."""
    logits = [case.student, *case.teachers]
    logits = [t.clone() if isinstance(t, Tensor) else t for t in logits]
    case.student, case.teachers = logits[0], logits[1:]
    case.options["reduction"] = "none"
    case.options.pop("num_items", None)
    clean = {backend: case.run(backend) for backend in runs(case)}
    for result in clean.values():
        for name, part in result.parts().items():
            assert not part.isnan().any(), f"{name} is NaN"
    target = logits[(who + 1) % len(logits)]
    if special is not None and len(case.student) > 1 and isinstance(target, Tensor):
        target[0, 0 if special != -INF else slice(None)] = special
        for backend, before in clean.items():
            after = case.run(backend)
            torch.testing.assert_close(after.loss[1:], before.loss[1:], rtol=1e-5, atol=1e-6, equal_nan=True)
            assert not after.grad[1:].isnan().any()
    fuzz.outcome("amtss_loss of huge logits")


# Heads.


@st.composite
def heads(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of `linear_amtss_loss`, and its options."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n, c, k = draw(st.integers(0, 20)), draw(st.integers(2, 40)), draw(st.integers(1, 5))
    dtype = draw(st.sampled_from([*FLOATS, torch.float64]))
    widths = [draw(st.integers(1, 12)) for _ in range(k)]
    lacking = [draw(st.sampled_from([0, 0, 1, -3])) for _ in range(k)]
    kinds = [draw(st.sampled_from([*FLOATS, None])) for _ in range(k)]
    weights = [numbers(g, max(1, c - less), h, 1.0) for less, h in zip(lacking, widths, strict=True)]
    arguments = {
        "student_hidden": draw(strided(numbers(g, n, 8, 1.0).to(dtype))),
        "student_weight": draw(strided(numbers(g, c, 8, 1.0).to(draw(st.sampled_from([dtype, torch.float32]))))),
        "teacher_hidden": [draw(strided(numbers(g, n, h, 1.0).to(draw(st.sampled_from(FLOATS))))) for h in widths],
        "teacher_weight": [
            quantize_weight(w) if kind is None else draw(strided(w.to(kind)))
            for w, kind in zip(weights, kinds, strict=True)
        ],
        "student_bias": numbers(g, 1, c, 1.0)[0].to(dtype) if draw(st.booleans()) else None,
        "teacher_bias": [numbers(g, 1, len(w), 1.0)[0] if draw(st.booleans()) else None for w in weights],
        "chunk_rows": draw(st.sampled_from([None, 1, 3, 1000])),
    }
    labels, extras = draw(row_inputs(g, n, c, k))
    return arguments | {"labels": labels}, draw(options()) | extras


@given(heads())
def test_any_call_of_heads(call: tuple[dict[str, Any], dict[str, Any]]) -> None:
    from test_linear import LinearCase

    a, chosen = call
    # What a teacher lacks is -inf: a teacher without the label, or a row that is taught by nobody, is for other tests.
    case = LinearCase(
        a["student_hidden"], a["student_weight"], a["student_bias"], a["teacher_hidden"], a["teacher_weight"],
        a["teacher_bias"], a["labels"], chosen,
    )  # fmt: skip
    exact, plain = case.unfused(torch.float64), case.unfused(torch.float32)
    got = case.run(None, chunk_rows=a["chunk_rows"])
    stats = AMTSSStats(*(exact[name] for name in AMTSSStats._fields))
    like = Case(case.hidden, case.teacher_hidden, case.labels, chosen)
    if tied(like, stats):
        got = {name: got[name] for name in ("margins", "kd", "student_margin")}
    size = units(like, stats)
    least = size | {
        f"grad_{name}": size["grad"] * 8 * max(1, len(case.hidden)) for name in ("hidden", "weight", "bias")
    }
    assert_parts_within_budget(got, exact, plain, 40 / chosen["temperature"], least)
    fuzz.outcome("linear_amtss_loss")


# Options, in and out of their ranges.

ANYTHING = st.one_of(
    st.floats(),
    st.sampled_from([0, 1, -1, 2**31, 2**62, 2**70, -(2**70), 10**400, 1e-300, 1e30, 1e300, 1e38, -INF, INF, NAN]),
    st.sampled_from([None, "", "2", "mean", True, [1.0], {}, (2,), 1j, b"2"]),
    st.sampled_from([*WEIGHTINGS, *REDUCTIONS]),
)


@given(st.dictionaries(st.sampled_from(OPTION_NAMES), ANYTHING, min_size=1, max_size=3), st.sampled_from([3, 200]))
def test_any_option(chosen: dict[str, Any], c: int) -> None:
    g = torch.Generator().manual_seed(c)
    student, teachers = numbers(g, 4, c, 3.0), [numbers(g, 4, c, 3.0) for _ in range(2)]
    labels = torch.tensor([0, c - 1, 1, 0])
    # kd_weight and ce_weight may be refused together.
    names = (*chosen, "kd_weight", "ignore_index")
    with fuzz.documented("LossOptions", (ValueError, TypeError), *names):
        made = LossOptions(**chosen)
        for backend in BACKENDS:
            leaf = student.clone().requires_grad_()
            loss, stats = amtss_loss(leaf, teachers, labels, return_stats=True, backend=backend, **chosen)
            loss.sum().backward()
            for part in (loss, leaf.grad, *stats):
                assert not part.isnan().any(), f"NaN from {made} on {backend}"
        AMTSSLoss(**chosen)(student, teachers, labels)
    if not any(isinstance(value, (list, dict)) for value in chosen.values()):
        return
    with pytest.raises((ValueError, TypeError)):
        amtss_loss(student, teachers, labels, **chosen)


# Arguments that do not fit.


def wrong_tensors(tensor: Tensor) -> st.SearchStrategy[Any]:
    """What is nearly this argument."""
    return st.sampled_from(
        [
            None, 3, "logits", [], [tensor, None], tensor.unsqueeze(0), tensor[..., :1], tensor[:0], tensor[:1],
            tensor.to(torch.int32), tensor.to(torch.complex64), tensor.bool(), tensor.double(), tensor.to("meta"),
            tensor.flatten(), torch.empty(0), tensor.numpy(), tensor.float() * NAN, tensor.float() * -INF,
            -5 - tensor.float(), -5 - tensor.long(), QuantizedLogits(tensor, tensor, None),  # type: ignore[arg-type]
            QuantizedWeight(tensor, None),  # type: ignore[arg-type]
        ]
    )  # fmt: skip


def ordinary() -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    return {
        "student_logits": numbers(g, 6, 5, 1.0),
        "teacher_logits": [numbers(g, 6, 5, 1.0), numbers(g, 6, 5, 1.0)],
        "labels": torch.tensor([0, 4, 1, IGNORED, UNLABELED, 2]),
        "teacher_prior": torch.rand(2, 6, generator=g),
        "teacher_mask": torch.rand(2, 6, generator=g) < 0.7,
        "sample_weight": torch.rand(6, generator=g),
        "num_items": 3,
        "backend": None,
    }


def ordinary_heads() -> dict[str, Any]:
    g = torch.Generator().manual_seed(2)
    call = ordinary()
    del call["student_logits"], call["teacher_logits"]
    return call | {
        "student_hidden": numbers(g, 6, 4, 1.0),
        "student_weight": numbers(g, 5, 4, 1.0),
        "teacher_hidden": [numbers(g, 6, 3, 1.0), numbers(g, 6, 2, 1.0)],
        "teacher_weight": [numbers(g, 5, 3, 1.0), quantize_weight(numbers(g, 5, 2, 1.0))],
        "student_bias": numbers(g, 1, 5, 1.0)[0],
        "teacher_bias": [numbers(g, 1, 5, 1.0)[0], None],
        "chunk_rows": 4,
    }


@st.composite
def spoiled(draw: st.DrawFn, call: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The call with one argument changed, and its name."""
    name = draw(st.sampled_from(sorted(call)))
    value = call[name]
    if isinstance(value, list):
        entry = draw(st.integers(0, len(value) - 1))
        there = value[entry]
        if isinstance(there, tuple) and draw(st.booleans()):
            field = draw(st.sampled_from(there._fields))
            changed: Any = there._replace(**{field: draw(wrong_tensors(getattr(there, field)))})
        else:
            changed = draw(wrong_tensors(there[0] if isinstance(there, tuple) else value[0]))
        whole = draw(st.sampled_from([[changed if k == entry else t for k, t in enumerate(value)], changed]))
        return call | {name: whole}, name
    if isinstance(value, Tensor):
        return call | {name: draw(wrong_tensors(value))}, name
    return call | {name: draw(st.one_of(ANYTHING, wrong_tensors(torch.tensor([3.0]))))}, name


def finite_or_said(result: Any, call: dict[str, Any]) -> None:
    """NaN only where an input holds NaN or a row of -inf."""
    loss = result.detach()
    if loss.is_meta:
        return
    flat = [t for value in call.values() for t in (value if isinstance(value, (list, tuple)) else [value])]
    flat = [t for value in flat for t in (value if isinstance(value, tuple) else [value])]
    if all(bool(t.isfinite().all()) for t in flat if isinstance(t, Tensor) and t.is_floating_point()):
        assert not loss.isnan().any(), "NaN from finite arguments"


@pytest.mark.parametrize("backend", [None, "reference"])
@given(data=st.data())
def test_wrong_arguments_are_named(backend: str | None, data: st.DataObject) -> None:
    call, name = data.draw(spoiled(ordinary() | {"backend": backend}))
    # Where two do not fit, either may be named.
    others = {"student_logits": ("teacher_logits",), "teacher_logits": ("teacher_mask", "teacher_prior")}.get(name, ())
    with fuzz.documented("amtss_loss, arguments", WRONG, name, *others):
        finite_or_said(amtss_loss(**call), call)


@given(data=st.data())
def test_wrong_arguments_of_heads_are_named(data: st.DataObject) -> None:
    call, name = data.draw(spoiled(ordinary_heads()))
    # Where two do not fit, either may be named.
    others = {
        "student_hidden": ("student_weight", "teacher_hidden", "labels"),
        "student_weight": ("student_bias", "labels"),
        "teacher_hidden": ("teacher_weight", "teacher_bias", "teacher_mask", "teacher_prior"),
        "teacher_weight": ("teacher_bias",),
    }.get(name, ())
    with fuzz.documented("linear_amtss_loss, arguments", WRONG, name, *others):
        finite_or_said(linear_amtss_loss(**call), call)


# Codes.


@given(cases(spreads=(0.0, 1e-43, 1e-30, 2.0, 1e4, 3e38)))
def test_any_logits_are_quantized(case: Case) -> None:
    logits = case.student.float()
    q = quantize_logits(logits)
    values = q.dequantize()
    assert torch.equal(values == -INF, logits == -INF)
    assert not values.isnan().any()
    largest = logits.amax(-1, keepdim=True)
    assert torch.equal(values.amax(-1, keepdim=True), largest)
    near = logits.isfinite() & (largest - logits <= 66)
    slack = 4 * torch.finfo(torch.float32).eps * (66 + logits.abs().nan_to_num(0, 0, 0))
    assert ((values - logits).abs() <= q.step.unsqueeze(-1) / 2 + slack)[near].all()
    fuzz.outcome("quantize_logits")
    if case.student.numel() == 0:
        return
    weight = case.student
    with fuzz.documented("quantize_weight", ValueError, "weight must be finite"):
        w = quantize_weight(weight)
        off = (w.dequantize() - weight.float()).abs()
        assert (off <= w.scale.unsqueeze(-1) * (0.5 + 1e-4) + 1e-37).all()
        assert (w.codes != -128).all()


@given(st.sampled_from([quantize_logits, quantize_weight]), st.data())
def test_what_cannot_be_quantized_is_named(function: Any, data: st.DataObject) -> None:
    tensor = torch.randn(3, 4, generator=torch.Generator().manual_seed(3))
    value = data.draw(wrong_tensors(tensor))
    with fuzz.documented(f"{function.__name__}, arguments", (ValueError, TypeError), "logits", "weight"):
        function(value)


# The adaptive strategy.

NUMBERS = st.one_of(st.floats(), st.sampled_from([0, 1, 3, -1, None, "2", INF, NAN, True, 1e-30, 1e30, 2.5]))


@given(st.data())
def test_any_strategy(data: st.DataObject) -> None:
    draw = data.draw
    k, n_languages, n = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(0, 30))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    chosen: dict[str, Any] = {
        "importance_temperature": draw(st.sampled_from([None, 1e-3, 0.1, 1.0, INF])),
        "gap_temperature": draw(st.sampled_from([None, 1e-3, 0.1, 1.0, INF])),
    }
    arguments = {"n_teachers": k, "n_languages": n_languages} | chosen
    if draw(st.booleans()):
        arguments[draw(st.sampled_from([*arguments, "floor", "max_weight", "memory"]))] = draw(NUMBERS)
    ids = torch.randint(n_languages, (n,), generator=g)
    wrong = draw(
        st.sampled_from(["nothing"] * 4 + ["too large", "negative", "int32", "one id", "list", "margins", "mask"])
    )
    ids = {
        "too large": ids + n_languages, "negative": ids - n_languages, "int32": ids.int(), "one id": torch.tensor(0),
        "list": ids.tolist(),
    }.get(wrong, ids)  # fmt: skip
    margins = torch.randn(k + (wrong == "margins"), n, generator=g) * draw(st.sampled_from([0.0, 0.3, 30.0]))
    if draw(st.booleans()):
        margins = margins.masked_fill(torch.rand(margins.shape, generator=g) < 0.2, -INF)
    stats = AMTSSStats(
        *(torch.randn(n, generator=g) if name == "student_margin" else margins for name in AMTSSStats._fields)
    )
    mask = torch.rand(k, n, generator=g) < 0.7 if wrong != "mask" else torch.ones(k, n)
    with fuzz.documented(
        "AdaptiveStrategy", (ValueError, TypeError), *arguments, "language_ids", "margins", "teacher_mask"
    ):
        adaptive = AdaptiveStrategy(**arguments)
        if draw(st.booleans()):
            adaptive.start(margins, ids, teacher_mask=mask)
            adaptive.step()
        for _ in range(draw(st.integers(1, 3))):
            adaptive.update(stats, ids, teacher_mask=mask, row_mask=torch.rand(n, generator=g) < 0.8)
            adaptive.step()
        importance, weight = adaptive.importance, adaptive.language_weight
        on = adaptive.importance_temperature is not None
        torch.testing.assert_close(importance.sum(0), torch.full((adaptive.n_languages,), 1.0 if on else float(k)))
        assert weight.isfinite().all()
        assert (weight > 0).all()
        assert torch.equal(adaptive.teacher_prior(ids), importance[:, ids])
        assert torch.equal(adaptive.sample_weight(ids), weight[ids])
        again = AdaptiveStrategy(**arguments)
        again.load_state_dict(adaptive.state_dict())
        assert torch.equal(again.importance, importance)
        assert wrong == "nothing" or n == 0
