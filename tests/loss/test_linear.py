"""The loss through its heads, against the loss of the logits that the same products give in float64."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backends import available_backends, is_interpreted
from numerics import IGNORED, UNLABELED, assert_parts_within_budget
from test_loss import OPTIONS
from torch import Tensor

from amtss_fast import QuantizedWeight, TopKLogprobs, amtss_loss, linear_amtss_loss, quantize_weight
from amtss_fast.loss import head as heads
from amtss_fast.loss import linear_compute
from amtss_fast.loss.head import default_chunk_rows
from amtss_fast.loss.options import LossOptions

NAN = math.nan
STUDENT_SCALING = ("student_scale", "student_softcap")
TEACHER_SCALING = ("teacher_scale", "teacher_softcap")


@dataclass
class LinearCase:
    """One call: hidden states, heads, biases of student and teachers, and options."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    teacher_hidden: list[Tensor | TopKLogprobs]
    teacher_weight: list[Tensor | QuantizedWeight | None]
    teacher_bias: list[Tensor | None]
    labels: Tensor | None
    options: dict[str, Any] = field(default_factory=dict)

    def student(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        tensors = [t for t in (self.hidden, self.weight, self.bias) if t is not None]
        return [t.detach().to(dtype or t.dtype, copy=True).requires_grad_() for t in tensors]

    def run(self, backend: str | None, grad_output: Tensor | None = None, **options: Any) -> dict[str, Tensor]:
        student = self.student()
        loss, stats = linear_amtss_loss(
            *student[:2], self.teacher_hidden, self.teacher_weight, self.labels,
            student_bias=student[2] if self.bias is not None else None, teacher_bias=self.teacher_bias,
            return_stats=True, backend=backend, **self.options | options,
        )  # fmt: skip
        loss.backward(torch.ones_like(loss) if grad_output is None else grad_output)
        for tensor in student:
            assert tensor.grad is not None
            assert tensor.grad.dtype == tensor.dtype
        return _parts(loss, student, stats)

    def unfused(self, dtype: torch.dtype, grad_output: Tensor | None = None) -> dict[str, Tensor]:
        """All logits at once, from the same (already rounded) inputs, and the reference's loss of them."""
        student = self.student(dtype)
        n_classes = len(self.weight)
        logits: list[Tensor | TopKLogprobs] = []
        for hidden, weight, bias in zip(self.teacher_hidden, self.teacher_weight, self.teacher_bias, strict=True):
            if isinstance(hidden, TopKLogprobs):
                logits.append(hidden._replace(logprobs=hidden.logprobs.to(dtype)))
                continue
            dense = weight.dequantize() if isinstance(weight, QuantizedWeight) else weight
            values = F.linear(hidden.to(dtype), dense.to(dtype), None if bias is None else bias.to(dtype))
            values = scaled(values, *(of_teacher(self.options.get(name), len(logits)) for name in TEACHER_SCALING))
            values = F.pad(values, (0, max(0, n_classes - len(dense))), value=-math.inf)
            logits.append(values[:, :n_classes])
        options = {
            name: o.to(dtype) if isinstance(o, Tensor) and o.is_floating_point() else o
            for name, o in self.options.items()
            if name not in STUDENT_SCALING + TEACHER_SCALING
        }
        own = scaled(F.linear(*student), *(self.options.get(name) for name in STUDENT_SCALING))
        loss, stats = amtss_loss(own, logits, self.labels, return_stats=True, backend="reference", **options)
        loss.backward(torch.ones_like(loss) if grad_output is None else grad_output.to(dtype))
        return _parts(loss, student, stats)

    def check(self, backend: str | None, grad_output: Tensor | None = None, **options: Any) -> None:
        exact = self.unfused(torch.float64, grad_output)
        plain = self.unfused(torch.float32, grad_output)
        # Logits of these cases lie below 16.
        exponent = 16 / self.options.get("temperature", 2.0)
        assert_parts_within_budget(self.run(backend, grad_output, **options), exact, plain, exponent)


def scaled(logits: Tensor, scale: float | None, softcap: float | None) -> Tensor:
    logits = logits if scale is None else scale * logits
    return logits if softcap is None else softcap * (logits / softcap).tanh()


def of_teacher(values: Any, k: int) -> float | None:
    return values[k] if isinstance(values, list | tuple) else values


def _parts(loss: Tensor, student: list[Tensor], stats: Any) -> dict[str, Tensor]:
    names = ("grad_hidden", "grad_weight", "grad_bias")
    grads = {name: t.grad.cpu() for name, t in zip(names, student, strict=False) if t.grad is not None}
    return {"loss": loss.detach().cpu(), **grads, **{name: t.cpu() for name, t in stats._asdict().items()}}


def make_linear_case(
    n: int = 29,
    c: int = 37,
    *,
    dtype: torch.dtype = torch.float32,
    widths: tuple[int, ...] = (5, 12, 9),
    bias: bool = True,
    special_rows: bool = True,
    extras: bool = False,
    seed: int = 0,
    **options: Any,
) -> LinearCase:
    with torch.device("cpu"):
        g = torch.Generator().manual_seed(seed)
        k = len(widths)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g).to(dtype)

        labels = torch.randint(c, (n,), generator=g)
        if special_rows:
            labels[2::7] = IGNORED
            labels[3::5] = UNLABELED
        if extras:
            options["teacher_mask"] = torch.rand(k, n, generator=g) < 0.6
            options["teacher_prior"] = torch.rand(k, n, generator=g) * (torch.rand(k, n, generator=g) < 0.8)
            options["sample_weight"] = torch.rand(n, generator=g) * (torch.rand(n, generator=g) < 0.8)
        case = LinearCase(
            normal(n, 8),
            normal(c, 8),
            normal(c) if bias else None,
            [normal(n, h) for h in widths],
            [normal(c, h) for h in widths],
            [normal(c) if bias and i % 2 else None for i in range(k)],
            labels,
            options,
        )
    return _to(case, torch.get_default_device())


def _to(value: Any, device: Any) -> Any:
    if isinstance(value, LinearCase):
        return LinearCase(**{name: _to(item, device) for name, item in vars(value).items()})
    if isinstance(value, list):
        return [_to(item, device) for item in value]
    if isinstance(value, dict):
        return {name: _to(item, device) for name, item in value.items()}
    return value.to(device) if isinstance(value, Tensor | QuantizedWeight | TopKLogprobs) else value


def route(case: LinearCase, share: float = 0.4) -> LinearCase:
    """Each teacher but the second with rows of its own, some with ignored ones, the last with none."""
    g, n, last = torch.Generator().manual_seed(1), len(case.hidden), len(case.teacher_hidden) - 1
    with torch.device("cpu"):
        picked = [torch.rand(n, generator=g) < (share if k < last else 0) for k in range(last + 1)]
    rows = [None if k == 1 else own.nonzero().squeeze(1).to(case.hidden.device) for k, own in enumerate(picked)]
    hidden = [h if own is None else _rows(h, own) for h, own in zip(case.teacher_hidden, rows, strict=True)]
    return replace(case, teacher_hidden=hidden, options=case.options | {"teacher_rows": rows})


def _rows(hidden: Tensor | TopKLogprobs, own: Tensor) -> Tensor | TopKLogprobs:
    if isinstance(hidden, TopKLogprobs):
        return hidden._replace(indices=hidden.indices[own], logprobs=hidden.logprobs[own])
    return hidden[own]


def with_list(case: LinearCase, k: int, length: int, tail: Any = "bucket") -> LinearCase:
    """Teacher `k` gives its `length` most likely classes."""
    logits = F.linear(case.teacher_hidden[k].float(), case.teacher_weight[k].float())
    logprobs, indices = logits.log_softmax(-1).topk(length)

    def put(values: list[Any], value: Any) -> list[Any]:
        return [value if i == k else old for i, old in enumerate(values)]

    return replace(
        case,
        teacher_hidden=put(case.teacher_hidden, TopKLogprobs(indices, logprobs, tail)),
        teacher_weight=put(case.teacher_weight, None),
        teacher_bias=put(case.teacher_bias, None),
    )


def few_in_the_interpreter(backend: str, chosen: bool) -> None:
    """Skips what is not `chosen` there: the head is the same on every backend, and the interpreter is slow."""
    if is_interpreted(backend) and not chosen:
        pytest.skip("a few cases are enough in the interpreter")


# The same as the loss of the logits.


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("extras", [False, True])
def test_heads_within_budget(backend: str, options: dict[str, Any], extras: bool) -> None:
    case = make_linear_case(extras=extras, **options)
    grad_output = torch.randn(29) if options.get("reduction") == "none" else torch.tensor(0.37)
    case.check(backend, grad_output, chunk_rows=8)


@pytest.mark.parametrize("head", ["float32", "bfloat16", "float16", "8-bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_heads_of_any_dtype(backend: str, dtype: torch.dtype, head: str) -> None:
    case = make_linear_case(9 if is_interpreted(backend) else 33, 300, dtype=dtype, ce_weight=0.5)
    # A float32 student with teachers of other types, and one teacher whose hidden states and head differ.
    case.teacher_weight = [
        quantize_weight(w) if head == "8-bit" else w.to(getattr(torch, head)) for w in case.teacher_weight
    ]
    if torch.get_default_device().type == "cpu":
        # There products are in float32; an accelerator's are in half precision and have its error.
        case.teacher_hidden[0] = case.teacher_hidden[0].bfloat16()
        case.check(backend, chunk_rows=5)
    else:
        torch.testing.assert_close(case.run(backend)["loss"], case.unfused(torch.float32)["loss"], rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("bias", [False, True])
def test_heads_of_250002_classes(backend: str, bias: bool) -> None:
    # In the interpreter, fewer chunks of the same kernels.
    n, c = (1, 20_011) if is_interpreted(backend) else (3, 250_002)
    make_linear_case(n, c, widths=(4, 6), bias=bias, special_rows=False, ce_weight=0.3).check(backend)


def test_float64_goes_through_the_reference() -> None:
    case = make_linear_case(dtype=torch.float64, ce_weight=0.5, extras=True)
    exact = case.unfused(torch.float64)
    for name, value in case.run(None, chunk_rows=4).items():
        torch.testing.assert_close(value, exact[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "options", [{"weighting": "label_nll", "ce_weight": 0.5}, {"label_smoothing": 0.1, "ce_weight": 1}]
)
@pytest.mark.parametrize("c", [2, 37])
def test_rows_of_logits_that_are_filled_up(
    backend: str, c: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an accelerator, where they begin at a multiple of bytes."""
    case = make_linear_case(c=c, extras=True, **options)
    monkeypatch.setattr(heads, "_CPU", heads._CPU._replace(classes=16))
    case.check(backend, chunk_rows=8)


@pytest.mark.parametrize("c", [37, 9000])
def test_the_chunk_changes_nothing(backend: str, c: int) -> None:
    if backend == "triton" and c == 9000:
        pytest.skip("blocks of a head do not depend on the backend")
    case = make_linear_case(c=c, ce_weight=0.5, extras=True)
    whole = case.run(backend, chunk_rows=29)
    for rows in (None, 7, 1000):
        for name, value in case.run(backend, chunk_rows=rows).items():
            torch.testing.assert_close(value, whole[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("sizes", [heads._CPU, heads._ACCELERATOR])
def test_vocabularies_of_different_sizes(monkeypatch: pytest.MonkeyPatch, backend: str, sizes: heads.Sizes) -> None:
    """Also where rows of logits are filled up, as on an accelerator."""
    monkeypatch.setattr(heads, "sizes_of", lambda device: sizes)
    case = make_linear_case()
    short, long = case.teacher_weight[0][:30], torch.cat([case.teacher_weight[2], 9 * torch.ones(6, 9)])
    case.teacher_weight = [short, case.teacher_weight[1], long]
    case.labels[:3] = 36
    for weighting in ("label_margin", "label_nll"):
        case.options = {"weighting": weighting}
        case.check(backend, chunk_rows=8)


@pytest.mark.parametrize("label", [37, 40, 2**40])
def test_a_label_beyond_the_last_class_makes_its_row_nan(
    monkeypatch: pytest.MonkeyPatch, backend: str, label: int
) -> None:
    """As on an accelerator: values are not looked at before, and rows of logits are longer than C = 37."""
    if backend != "triton":
        pytest.skip("the other backends look at the labels")
    monkeypatch.setattr(heads, "sizes_of", lambda device: heads._ACCELERATOR)
    monkeypatch.setattr(linear_compute, "values_are_free", lambda tensor: False)
    case = make_linear_case(special_rows=False, reduction="none")
    case.labels[2] = label
    loss = case.run(backend)["loss"]
    assert loss.isnan().nonzero().flatten().tolist() == [2]


SCALINGS: list[dict[str, Any]] = [
    {"student_softcap": 4.0, "teacher_softcap": [2.0, None, 7.0]},
    {"student_scale": 0.4, "teacher_scale": 1.7},
    {"student_scale": 2.5, "student_softcap": 3, "teacher_scale": (None, 0.1, 2), "teacher_softcap": 6.0},
]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_models_that_scale_and_cap_their_logits(
    backend: str, scaling: dict[str, Any], reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in blocks, and where the classes that a teacher lacks and those that fill a row up stay -inf."""
    few_in_the_interpreter(backend, reduction == "mean")
    monkeypatch.setattr(heads, "_CPU", heads._CPU._replace(block=16, classes=16))
    case = make_linear_case(extras=True, ce_weight=0.5, reduction=reduction, **scaling)
    case.teacher_weight[0] = quantize_weight(case.teacher_weight[0])
    case.teacher_weight[2] = case.teacher_weight[2][:36]
    case.labels[case.labels == 36] = 5
    case.check(backend, torch.rand(29) if reduction == "none" else torch.tensor(0.37), chunk_rows=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cap_in_any_dtype(backend: str, dtype: torch.dtype) -> None:
    """Logits far beyond the cap, where the gradient all but vanishes."""
    if torch.get_default_device().type != "cpu":
        pytest.skip("an accelerator's products are in half precision and have its error")
    case = make_linear_case(9, 40, dtype=dtype, ce_weight=0.5, student_softcap=2.0, student_scale=3.0)
    case.check(backend, chunk_rows=5)


def test_gradcheck_through_a_cap() -> None:
    case = make_linear_case(5, 4, dtype=torch.float64, ce_weight=0.5, widths=(3, 2))

    def loss(*student: Tensor) -> Tensor:
        return linear_amtss_loss(
            *student[:2], case.teacher_hidden, case.teacher_weight, case.labels, student_bias=student[2],
            student_scale=1.3, student_softcap=2.0, teacher_softcap=3.0, teacher_scale=[None, 0.5],
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, tuple(case.student()))


@pytest.mark.parametrize("value", [1e-12, 1e12])
@pytest.mark.parametrize("name", [*STUDENT_SCALING, *TEACHER_SCALING])
def test_extreme_scales_give_finite_numbers(backend: str, name: str, value: float) -> None:
    few_in_the_interpreter(backend, name == "student_softcap")
    case = make_linear_case(9, 5, ce_weight=0.5, **{name: value})
    for part, tensor in case.run(backend).items():
        assert tensor.isfinite().all(), part


def test_one_tensor_stands_for_equal_teachers() -> None:
    case = make_linear_case(widths=(6, 6), bias=False)
    stacked = linear_amtss_loss(
        case.hidden, case.weight, torch.stack(case.teacher_hidden), torch.stack(case.teacher_weight), case.labels
    )
    assert torch.equal(
        stacked, linear_amtss_loss(case.hidden, case.weight, case.teacher_hidden, case.teacher_weight, case.labels)
    )


def test_strided_inputs() -> None:
    case = make_linear_case(ce_weight=0.5)
    expected = case.run(None)
    case.hidden, case.weight = case.hidden.T.contiguous().T, torch.stack([case.weight, case.weight], 1)[:, 1]
    case.teacher_weight = [w.T.contiguous().T for w in case.teacher_weight]
    case.teacher_hidden = [torch.stack([h, h], -1)[..., 0] for h in case.teacher_hidden]
    for name, value in case.run(None).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)


# Rows that are left out.


@pytest.fixture
def product_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of hidden states that went into products for logits."""
    rows: list[int] = []

    def count(name: str, place: int) -> None:
        product: Callable[..., Tensor] = getattr(torch, name)

        def counting(*arguments: Any, **options: Any) -> Tensor:
            # Those with a dtype of their own are sums of gradients.
            if "out_dtype" not in options:
                rows.append(len(arguments[place]))
            return product(*arguments, **options)

        monkeypatch.setattr(torch, name, counting)

    count("mm", 0)
    count("addmm", 1)
    return rows


def test_ignored_rows_are_left_out_of_the_products(backend: str, product_rows: list[int]) -> None:
    # Everywhere one product for each head.
    case = make_linear_case(20, 48, special_rows=False, ce_weight=0.4)
    keep = torch.arange(20) % 3 != 0
    part = LinearCase(
        case.hidden[keep], case.weight, case.bias, [h[keep] for h in case.teacher_hidden], case.teacher_weight,
        case.teacher_bias, case.labels[keep], case.options,
    )  # fmt: skip
    case.labels[~keep] = IGNORED
    for hidden in (case.hidden, *case.teacher_hidden):
        hidden[~keep] = NAN
    whole = case.run(backend, chunk_rows=5)
    assert sum(product_rows) == 4 * 13
    alone = part.run(backend, chunk_rows=5)
    keep = keep.cpu()
    for name in ("loss", "grad_weight", "grad_bias"):
        assert torch.equal(whole[name], alone[name])
    assert torch.equal(whole["grad_hidden"][keep], alone["grad_hidden"])
    assert (whole["grad_hidden"][~keep] == 0).all()
    for name in ("weights", "margins", "kd", "student_margin"):
        assert torch.equal(whole[name][..., keep], alone[name])
        assert (whole[name][..., ~keep] == 0).all()


@pytest.mark.parametrize("how", ["mask", "prior of the row", "prior"])
def test_rows_that_a_teacher_does_not_teach_are_left_out(backend: str, how: str, product_rows: list[int]) -> None:
    case = make_linear_case(20, special_rows=False)
    absent = torch.zeros(3, 20, dtype=torch.bool)
    absent[1] = True if how == "prior" else torch.arange(20) % 4 == 0
    case.options = {
        "mask": {"teacher_mask": ~absent},
        "prior of the row": {"teacher_prior": (~absent).float()},
        "prior": {"teacher_prior": torch.tensor([1.0, 0.0, 1.0])},
    }[how]
    clean = case.run(backend, chunk_rows=8)
    if absent.device.type == "cpu":
        assert sum(product_rows) == 4 * 20 - int(absent.sum())
    case.teacher_hidden[1][absent[1]] = NAN
    for name, value in case.run(backend, chunk_rows=8).items():
        assert torch.equal(value, clean[name]), name


# Teachers with rows of their own, and top-k lists.

DIVERGING: list[dict[str, Any]] = [
    {"divergence": "jsd", "divergence_beta": 0.3, "ce_weight": 0.5, "teacher_temperature": (0.7, 2.0, 5.0)},
    {"divergence": "reverse_kl", "teacher_temperature": 3.0, "weighting": "top2_margin"},
    {"divergence": "tvd", "temperature": 1.0, "weighting": "label_nll", "student_softcap": 5.0, "teacher_scale": 0.5},
    {"divergence": "skew_forward_kl", "reduction": "sum", "student_softcap": 3.0},
    {"divergence": "skew_reverse_kl", "ce_weight": 0.2, "label_smoothing": 0.1},
]


def grad_output(reduction: str = "mean") -> Tensor:
    return torch.rand(29) if reduction == "none" else torch.tensor(0.37)


@pytest.mark.parametrize("options", DIVERGING)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_divergences_and_temperatures(backend: str, options: dict[str, Any], reduction: str) -> None:
    few_in_the_interpreter(backend, reduction == "mean")
    case = make_linear_case(extras=True, **{"reduction": reduction} | options)
    case.check(backend, grad_output(case.options["reduction"]), chunk_rows=8)


@pytest.mark.parametrize("options", [{}, *DIVERGING])
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_routed_teachers(backend: str, options: dict[str, Any], extras: bool, reduction: str) -> None:
    few_in_the_interpreter(backend, extras and reduction == "mean")
    case = route(make_linear_case(extras=extras, **{"reduction": reduction} | options))
    case.teacher_weight[0] = quantize_weight(case.teacher_weight[0])
    case.check(backend, grad_output(case.options["reduction"]), chunk_rows=8)


def test_routed_teachers_are_masked_ones(backend: str) -> None:
    whole = make_linear_case(ce_weight=0.5, extras=True)
    routed = route(whole)
    for k, own in enumerate(routed.options["teacher_rows"]):
        if own is not None:
            whole.options["teacher_mask"][k] &= torch.zeros(29, dtype=torch.bool).index_fill(0, own, True)
    for chunk_rows in (None, 8) if is_interpreted(backend) else (None, 1, 8, 29):
        got, expected = routed.run(backend, chunk_rows=chunk_rows), whole.run(backend, chunk_rows=8)
        for name, value in got.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_only_taught_rows_enter_products(backend: str, product_rows: list[int]) -> None:
    case = route(make_linear_case(20, 48, special_rows=False, ce_weight=0.4))
    case.labels[::3] = IGNORED
    keep = case.labels != IGNORED
    for hidden, own in zip(case.teacher_hidden, case.options["teacher_rows"], strict=True):
        hidden[~(keep if own is None else keep[own])] = NAN
    for name, value in case.run(backend, chunk_rows=5).items():
        assert value.isfinite().all(), name
    taught = sum(int((keep if own is None else keep[own]).sum()) for own in case.options["teacher_rows"])
    assert sum(product_rows) == int(keep.sum()) + taught


def test_rows_of_a_teacher_lie_side_by_side(product_rows: list[int]) -> None:
    """However they are mixed in a batch, a chunk has rows of few teachers, and its products have many rows."""
    case = make_linear_case(18, 48, special_rows=False)
    rows = [torch.arange(k, 18, 3) for k in range(3)]
    case.teacher_hidden = [h[own] for h, own in zip(case.teacher_hidden, rows, strict=True)]
    case.options["teacher_rows"] = rows
    case.run(None, chunk_rows=6)
    assert product_rows == [6] * 6


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"divergence": "jsd", "temperature": 1.0, "ce_weight": 0.5}])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("length", [1, 7, 37])
def test_teachers_of_top_k_lists(
    backend: str, options: dict[str, Any], reduction: str, routed: bool, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where rows of logits are filled up, and a list holds all classes but for rounding."""
    few_in_the_interpreter(backend, routed and reduction == "mean" and length == 7)
    monkeypatch.setattr(heads, "_CPU", heads._CPU._replace(classes=16))
    n = 9 if is_interpreted(backend) else 29
    case = make_linear_case(n, extras=True, reduction=reduction, teacher_scale=[None, 1.2, None], **options)
    case = with_list(with_list(case, 0, length), 2, 5, "renormalize")
    case = route(case) if routed else case
    case.check(backend, grad_output(reduction), chunk_rows=8)


def test_no_logits_are_made_of_a_list(product_rows: list[int]) -> None:
    case = make_linear_case(20, special_rows=False, temperature=1.0)
    for k in range(3):
        case = with_list(case, k, 4)
    case.check(None)
    product_rows.clear()
    case.run(None)
    assert sum(product_rows) == 20
    case = with_list(make_linear_case(20, special_rows=False, temperature=1.0), 1, 4)
    args = case.hidden, case.weight, case.teacher_hidden[1], [None]
    assert torch.equal(
        linear_amtss_loss(*args, temperature=1.0), linear_amtss_loss(*args[:2], [args[2]], [None], temperature=1.0)
    )


@pytest.mark.parametrize("order", ["in turn", "one after the other"])
def test_teachers_that_share_out_the_rows_take_the_memory_of_one(monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    monkeypatch.setattr(heads, "_CPU", heads._CPU._replace(chunk_bytes=1 << 20, least_rows=16, block=64))
    made: list[heads.Scratch] = []

    def scratch(device: torch.device) -> heads.Scratch:
        made.append(heads.Scratch(device))
        return made[-1]

    def peak(case: LinearCase) -> int:
        case.run("cpu" if "cpu" in available_backends() else "reference")
        return sum(buffer.nbytes for buffer in made[-1]._buffers.values())

    monkeypatch.setattr(linear_compute, "Scratch", scratch)
    one = make_linear_case(600, 2000, widths=(8,), special_rows=False)
    ten = make_linear_case(600, 2000, widths=(8,) * 10, special_rows=False)
    owner = torch.arange(600) % 10 if order == "in turn" else torch.arange(600) // 60
    rows = [(owner == k).nonzero().squeeze(1) for k in range(10)]
    ten.teacher_hidden = [hidden[own] for hidden, own in zip(ten.teacher_hidden, rows, strict=True)]
    masked = replace(ten, teacher_hidden=[one.teacher_hidden[0]] * 10)
    ten.options["teacher_rows"] = rows
    masked.options = {"teacher_mask": torch.stack([owner == k for k in range(10)])}
    assert peak(ten) <= 1.05 * peak(one)
    assert peak(masked) <= 1.05 * peak(one)


def test_wrong_rows_and_lists_are_named() -> None:
    case = route(make_linear_case(temperature=1.0))
    case.options["teacher_rows"][0] = case.options["teacher_rows"][0].flip(0)
    with pytest.raises(ValueError, match=r"teacher_rows\[0\] must be ascending"):
        case.run(None)
    case = with_list(make_linear_case(temperature=1.0), 1, 4)
    case.teacher_hidden[1].indices[3, 2] = 37
    with pytest.raises(ValueError, match=r"\[1\].indices\[3, 2\] = 37 is no class from 0 to 36"):
        case.run(None, chunk_rows=2)


def test_teachers_that_nobody_looks_at_are_left_out(product_rows: list[int]) -> None:
    case = make_linear_case(20, special_rows=False)
    linear_amtss_loss(
        case.hidden, case.weight, case.teacher_hidden, case.teacher_weight, case.labels, kd_weight=0, ce_weight=1
    )
    assert sum(product_rows) == 20


@pytest.mark.parametrize("n", [0, 5])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_row_that_counts(backend: str, n: int, reduction: str) -> None:
    case = make_linear_case(n, ce_weight=1.0, reduction=reduction)
    case.labels = torch.full((n,), IGNORED)
    for name, value in case.run(backend).items():
        assert (value == 0).all(), name


def test_wrong_labels_are_named_by_their_row(backend: str) -> None:
    if torch.get_default_device().type != "cpu":
        pytest.skip("checked on CPU tensors")
    case = make_linear_case()
    case.labels[13] = 37
    with pytest.raises(ValueError, match=r"labels\[13\] = 37 is not allowed: expected 0 to 36"):
        case.run(backend, chunk_rows=4)


# Gradients.


@pytest.mark.parametrize("wanted", range(1, 8))
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_only_where_required(wanted: int, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_linear_case(reduction=reduction)
    grad_output = torch.rand(29) if reduction == "none" else torch.tensor(2.0)
    everything = case.run(None, grad_output)
    names = ("grad_hidden", "grad_weight", "grad_bias")
    needs = [bool(wanted >> i & 1) for i in range(3)]
    sizes: set[tuple[bool, ...]] = set()
    add_gradients = heads.Head.add_gradients

    def spy(self: Any, pick: Any, grad: Tensor, logits: Tensor, first: bool, *targets: Tensor) -> None:
        sizes.add(tuple(target.numel() > 0 for target in targets))
        add_gradients(self, pick, grad, logits, first, *targets)

    monkeypatch.setattr(heads.Head, "add_gradients", spy)
    student = [t.requires_grad_(need) for t, need in zip(case.student(), needs, strict=True)]
    teachers = [t.requires_grad_() for t in case.teacher_hidden]
    loss = linear_amtss_loss(
        *student[:2], teachers, case.teacher_weight, case.labels, student_bias=student[2],
        teacher_bias=case.teacher_bias, **case.options,
    )  # fmt: skip
    loss.backward(grad_output)
    assert sizes == {tuple(needs)}
    for name, tensor, need in zip(names, student, needs, strict=True):
        if need:
            torch.testing.assert_close(tensor.grad, everything[name])
        else:
            assert tensor.grad is None
    assert all(t.grad is None for t in teachers)


def test_no_gradient_wanted_none_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_linear_case()
    monkeypatch.delattr(heads.Head, "add_gradients")
    assert not linear_amtss_loss(case.hidden, case.weight, case.teacher_hidden, case.teacher_weight).requires_grad


def test_the_gradient_of_a_bfloat16_head_is_summed_in_float32(backend: str) -> None:
    # Row after row into bfloat16 would stop growing after 2^8 rows.
    if is_interpreted(backend):
        pytest.skip("on a CPU the sums do not depend on the backend")
    case = make_linear_case(600, 5, dtype=torch.bfloat16, widths=(8,), special_rows=False, reduction="sum")
    case.hidden, case.teacher_hidden = case.hidden[:1].expand(600, 8), [case.teacher_hidden[0][:1].expand(600, 8)]
    case.labels = None
    many = case.run(backend, chunk_rows=1)["grad_weight"].double()
    # On an accelerator the products are in bfloat16, and have its error.
    on_cpu = case.hidden.device.type == "cpu"
    exact = (case.unfused(torch.float64) if on_cpu else case.run(backend, chunk_rows=600))["grad_weight"].double()
    assert float((many - exact).abs().max()) <= 2**-8 * float(exact.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_are_summed_in_float32(backend: str, dtype: torch.dtype) -> None:
    # Each product is 2 + 2^-10, which half precision cannot hold.
    a, b = torch.full((8, 2), 1.0, dtype=dtype), torch.tensor([[2.0] * 8, [2.0**-10] * 8], dtype=dtype)
    total = torch.full((8, 8), NAN)
    for i in range(4):
        heads._add_product(total, a, b, first=i == 0)
    assert torch.equal(total, torch.full((8, 8), 4 * (2 + 2**-10)))


def test_tied_embeddings() -> None:
    ids, labels = torch.randint(50, (12,)), torch.randint(50, (12,))
    teacher_hidden, teacher_weight = torch.randn(12, 6), torch.randn(50, 6)
    grads = []
    for fused in (True, False):
        torch.manual_seed(0)
        embedding, mix = torch.nn.Embedding(50, 8), torch.nn.Linear(8, 8)
        hidden = mix(embedding(ids)).tanh()
        if fused:
            loss = linear_amtss_loss(hidden, embedding.weight, [teacher_hidden], [teacher_weight], labels, chunk_rows=5)
        else:
            loss = amtss_loss(hidden @ embedding.weight.T, [teacher_hidden @ teacher_weight.T], labels)
        loss.backward()
        grads.append(embedding.weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice_through_a_kept_graph(reduction: str) -> None:
    case = make_linear_case(reduction=reduction)
    student = case.student()
    loss = 3 * linear_amtss_loss(
        *student[:2], case.teacher_hidden, case.teacher_weight, case.labels, student_bias=student[2], **case.options
    )
    first = [g.clone() for g in torch.autograd.grad(loss.sum(), student, retain_graph=True)]
    for a, b in zip(first, torch.autograd.grad(loss.sum(), student), strict=True):
        assert torch.equal(a, b)


def test_second_derivative_is_refused() -> None:
    case = make_linear_case()
    student = case.student()
    loss = linear_amtss_loss(*student[:2], case.teacher_hidden, case.teacher_weight, case.labels)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, student[:2], create_graph=True)


@pytest.mark.parametrize("splits", [(8, 8, 8, 5), (1, 27, 1)])
def test_splitting_a_batch_changes_nothing(splits: tuple[int, ...]) -> None:
    case = make_linear_case(ce_weight=0.5)
    whole = case.run(None)
    count = (case.labels != IGNORED).sum()
    student = case.student()
    for rows in torch.arange(29).split(list(splits)):
        linear_amtss_loss(
            student[0][rows], student[1], [h[rows] for h in case.teacher_hidden], case.teacher_weight,
            case.labels[rows], student_bias=student[2], teacher_bias=case.teacher_bias, num_items=count,
            **case.options,
        ).backward()  # fmt: skip
    for name, tensor in zip(("grad_hidden", "grad_weight", "grad_bias"), student, strict=True):
        torch.testing.assert_close(tensor.grad, whole[name], rtol=1e-5, atol=1e-7)


def test_a_scaled_float16_loss_does_not_underflow() -> None:
    case = make_linear_case(64, 5000, dtype=torch.float16, special_rows=False)
    case.hidden, case.weight = case.hidden / 4, case.weight / 4
    scale = torch.tensor(2.0**16)
    got, exact = case.run(None, scale), case.unfused(torch.float64, scale)
    for name in ("grad_hidden", "grad_weight", "grad_bias"):
        torch.testing.assert_close(got[name].double(), exact[name], rtol=2e-3, atol=1e-3 * float(exact[name].std()))


# The operator.


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("need_grad", "need_stats"), [(True, True), (False, False)])
def test_operator_of_the_heads(
    backend: str, reduction: str, dtype: torch.dtype, need_grad: bool, need_stats: bool
) -> None:
    case = make_linear_case(9, 6, dtype=dtype, extras=True)
    o = case.options
    weight = quantize_weight(case.teacher_weight[0])
    grad_loss = torch.rand(9) if reduction == "none" and need_grad else None
    inputs = linear_compute.LinearInputs(
        case.hidden, case.weight, case.bias, case.teacher_hidden, [weight.codes, *case.teacher_weight[1:]],
        [weight.scale, None, None], case.teacher_bias, [], [], [], case.labels, o["teacher_prior"], o["teacher_mask"],
        o["sample_weight"], None,
    )  # fmt: skip
    options = LossOptions(ce_weight=0.5, label_smoothing=0.1, reduction=reduction)
    needs = [need_grad] * 3
    scalings = linear_compute.Scalings(1.5, 4.0, [1.0, 0.5, 2.0], [math.inf, 3.0, 5.0])
    arguments = (*inputs, *options.values(3), *scalings, grad_loss, 4, *needs, need_stats, backend)
    torch.library.opcheck(torch.ops.amtss_fast.linear_amtss_loss, arguments)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("need_grad", [True, False])
def test_operator_of_routed_teachers_and_lists(reduction: str, need_grad: bool) -> None:
    case = route(with_list(make_linear_case(9, 6, extras=True), 0, 4, "renormalize"))
    o, listed = case.options, case.teacher_hidden[0]
    inputs = linear_compute.LinearInputs(
        case.hidden, case.weight, None, [listed.logprobs, *case.teacher_hidden[1:]], case.teacher_weight,
        [None] * 3, case.teacher_bias, o["teacher_rows"], [listed.indices, None, None], [False] * 3, case.labels,
        o["teacher_prior"], o["teacher_mask"], o["sample_weight"], None,
    )  # fmt: skip
    options = LossOptions(
        divergence="jsd", divergence_beta=0.3, teacher_temperature=[1.0, 2.0, 3.0], reduction=reduction
    )
    scalings = linear_compute.Scalings(1.5, 4.0, [1.0, 0.5, 2.0], [math.inf, 3.0, 5.0])
    grad_loss = torch.rand(9) if reduction == "none" and need_grad else None
    needs = (need_grad, need_grad, False)
    arguments = (*inputs, *options.values(3), *scalings, grad_loss, 4, *needs, True, "reference")
    torch.library.opcheck(torch.ops.amtss_fast.linear_amtss_loss, arguments)


@pytest.mark.parametrize("extras", [{}, {"extras": True, "reduction": "none"}])
@pytest.mark.parametrize("return_stats", [False, True])
@pytest.mark.parametrize("new", [False, True])
def test_compiles_to_one_graph(extras: dict[str, Any], return_stats: bool, new: bool) -> None:
    """With `new` also a top-k list, routed teachers, a divergence, temperatures and caps."""
    case = make_linear_case(12, ce_weight=0.5, **extras)
    if new:
        case = route(with_list(case, 2, 4, "renormalize"))
        case.options |= {"divergence": "jsd", "teacher_temperature": [1.0, 2.0, 3.0]}
        case.options |= {"student_softcap": 4.0, "student_scale": 1.5, "teacher_softcap": [3.0, None, None]}
    quantized = [quantize_weight(case.teacher_weight[0]), *case.teacher_weight[1:]]
    torch._dynamo.reset()

    def step(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = linear_amtss_loss(
            2 * hidden, weight, case.teacher_hidden, quantized, case.labels, student_bias=bias,
            teacher_bias=case.teacher_bias, return_stats=return_stats, **case.options,
        )  # fmt: skip
        return out[0].sum() + out[1].kd.sum() if return_stats else out.sum()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        student = case.student()
        loss = function(*student)
        loss.backward()
        results.append([loss, *(t.grad for t in student)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_in_a_fresh_process() -> None:
    script = """
import torch
from amtss_fast import linear_amtss_loss
x, w = torch.randn(6, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
teachers, heads = torch.randn(3, 6, 4), torch.randn(3, 5, 4)
labels = torch.tensor([0, 4, -1, -100, 2, 1])
def step(x, w):
    return linear_amtss_loss(x.tanh(), w, teachers, heads, labels, ce_weight=0.5)
eager = torch.autograd.grad(step(x, w), (x, w))
fused = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(x, w), (x, w))
torch.testing.assert_close(eager, fused)
print("equal")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "equal", done.stderr


def test_autocast_changes_nothing() -> None:
    case = make_linear_case(ce_weight=0.5)
    expected = case.run(None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = case.run(None)
    for name, value in got.items():
        assert torch.equal(value, expected[name])


def test_same_inputs_same_bits() -> None:
    case = make_linear_case(150, 700, extras=True, ce_weight=0.5)
    first = case.run(None)
    for name, value in case.run(None).items():
        assert torch.equal(value, first[name])


@pytest.mark.parametrize(
    ("device", "chunk_bytes", "least", "unit"), [("cpu", 128 << 20, 64, 16), ("cuda", 1 << 30, 128, 128)]
)
@pytest.mark.parametrize("n_rows", [1, 64, 384, 2048, 100_000])
@pytest.mark.parametrize("n_classes", [3, 8000, 90_007, 250_002])
def test_default_chunks_are_even_and_small(
    device: str, chunk_bytes: int, least: int, unit: int, n_rows: int, n_classes: int
) -> None:
    rows = default_chunk_rows(n_rows, n_classes, 3, 4, torch.device(device))
    assert rows * 5 * n_classes * 4 <= chunk_bytes or rows == least
    assert rows % unit == 0
    n_chunks = math.ceil(n_rows / rows)
    assert n_chunks == 1 or n_rows / n_chunks > 0.75 * rows


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_waits_for_the_device_once_for_labels_and_once_for_rows(dtype: torch.dtype) -> None:
    case = _to(make_linear_case(300, 700, dtype=dtype, extras=True, ce_weight=0.5, reduction="mean"), "cuda")

    def waits() -> int:
        student = case.student()
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                linear_amtss_loss(
                    *student[:2], case.teacher_hidden, case.teacher_weight, case.labels, student_bias=student[2],
                    teacher_bias=case.teacher_bias, chunk_rows=32, **case.options,
                ).backward()  # fmt: skip
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(warning.message) for warning in caught)

    # Compiling the kernels may wait.
    waits()
    assert waits() == 1
    case.labels = None
    assert waits() == 0
    case = route(case)
    waits()
    assert waits() == 1


# 8-bit heads, and wrong input.


def test_quantized_head() -> None:
    weight = torch.randn(5000, 16) * torch.rand(5000, 1)
    weight[7] = 0
    quantized = quantize_weight(weight)
    assert quantized.codes.dtype == torch.int8
    error = (quantized.dequantize() - weight).abs()
    assert (error <= 0.501 * quantized.scale.unsqueeze(-1)).all()
    assert (quantized.dequantize()[7] == 0).all()
    assert torch.equal(
        quantize_weight(weight.bfloat16()).dequantize(), quantize_weight(weight.bfloat16().float()).dequantize()
    )


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (torch.ones(3, 2, dtype=torch.int64), TypeError, "weight must be floating, got torch.int64"),
        (torch.ones(3), ValueError, r"weight must be \[C, H\] .* got shape \[3\]"),
        (torch.tensor([[1.0, NAN]]), ValueError, "weight must be finite"),
    ],
)
def test_heads_that_cannot_be_quantized(weight: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quantize_weight(weight)


X, W, TX, TW = torch.zeros(4, 6), torch.zeros(3, 6), torch.zeros(2, 4, 5), torch.zeros(2, 3, 5)
ROWS, LIST = torch.tensor([0, 2]), TopKLogprobs(torch.arange(3).expand(4, 3), torch.full((4, 3), -2.0))
WRONG: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ((torch.zeros(2, 4, 6), W, TX, TW), {}, ValueError, r"student_hidden must have 2 dimensions, got .*\[2, 4, 6\]"),
    ((X.long(), W, TX, TW), {}, TypeError, "student_hidden must be floating, got torch.int64"),
    ((X, W[:, :5], TX, TW), {}, ValueError, r"student_weight has shape \[3, 5\], student_hidden \[4, 6\]"),
    ((X, W[:1], TX, TW), {}, ValueError, "student_weight must have at least 2 classes, got C = 1"),
    ((X, W, TX[0], TW), {}, ValueError, r"teacher_hidden must be .* got shape \[4, 5\]"),
    ((X, W, [], []), {}, ValueError, "teacher_hidden must hold at least one teacher"),
    ((X, W, TX, TW[:1]), {}, ValueError, "teacher_weight must hold one entry for each of 2 teachers, got 1"),
    ((X, W, [TX[0], TX[1][:3]], TW), {}, ValueError, r"teacher_hidden\[1\] has 3 rows, student_hidden 4"),
    ((X, W, TX, [TW[0], TW[1][:, :4]]), {}, ValueError, r"teacher_weight\[1\] has shape \[3, 4\]"),
    ((X, W, TX, [TW[0], TW[1].char()]), {}, TypeError, r"teacher_weight\[1\] must be floating, got torch.int8"),
    ((X, W, TX, [TW[0], "head"]), {}, TypeError, r"teacher_weight\[1\] must be a tensor, got str"),
    ((X, W, TX, TW.to("meta")), {}, RuntimeError, r"teacher_weight\[0\] is on meta, student_hidden on cpu"),
    ((X, W, TX, TW), {"student_bias": torch.zeros(4)}, ValueError, r"student_bias must have shape \[3\], got \[4\]"),
    ((X, W, TX, TW), {"teacher_bias": [None]}, ValueError, "teacher_bias must hold one entry for each of 2"),
    ((X, W, TX, TW), {"teacher_bias": [None, W[0]]}, ValueError, r"teacher_bias\[1\] must have shape \[3\]"),
    ((X, W, TX, TW), {"student_scale": 0.0}, ValueError, r"student_scale must be in \[1e-12, .*\], got 0.0"),
    ((X, W, TX, TW), {"student_softcap": -30}, ValueError, r"student_softcap must be in \[1e-12, .*\], got -30"),
    ((X, W, TX, TW), {"student_softcap": "30"}, TypeError, "student_softcap must be a number or None, got '30'"),
    ((X, W, TX, TW), {"teacher_scale": NAN}, ValueError, "teacher_scale must be in .*, got nan"),
    ((X, W, TX, TW), {"teacher_scale": [1.0]}, ValueError, "teacher_scale must be .* each of 2 teachers, got 1"),
    ((X, W, TX, TW), {"teacher_softcap": [3.0, math.inf]}, ValueError, r"teacher_softcap\[1\] must be in .*, got inf"),
    ((X, W, TX, TW), {"teacher_temperature": [1.0]}, ValueError, "teacher_temperature must .* 2 teachers, got 1"),
    ((X, W, TX, TW), {"teacher_rows": [None]}, ValueError, "teacher_rows must hold one .* 2 teachers, got 1"),
    ((X, W, TX, TW), {"teacher_rows": [None, ROWS.int()]}, TypeError, r"teacher_rows\[1\] must be int64"),
    ((X, W, TX, TW), {"teacher_rows": [None, ROWS]}, ValueError, r"teacher_hidden\[1\] has 4 rows, teacher_rows.* 2"),
    ((X, W, [TX[0], LIST], [TW[0]]), {}, ValueError, "teacher_weight must hold one entry for each of 2"),
    ((X, W, [TX[0], LIST], TW), {}, TypeError, r"teacher_weight\[1\] must be None where teacher_hidden\[1\] is TopK"),
    ((X, W, TX, [TW[0], None]), {}, TypeError, r"teacher_weight\[1\] must be a tensor, got NoneType"),
    ((X, W, [LIST], [None]), {"teacher_bias": [W[0]]}, TypeError, r"teacher_bias\[0\] must be None where"),
    ((X, W, [LIST], [None]), {"teacher_scale": [2.0], "temperature": 1}, TypeError, r"teacher_scale\[0\] must be None"),
    ((X, W, [LIST], [None]), {}, ValueError, r'temperature must be 1 where .*\[0\] has tail="bucket", got 2.0'),
    ((X[:3], W, [LIST], [None]), {"temperature": 1}, ValueError, r"teacher_hidden\[0\] has 4 rows, student_hidden 3"),
    ((X, W[:2], [LIST], [None]), {"temperature": 1}, ValueError, r"teacher_hidden\[0\] must list at most C = 2 "),
    ((X, W, [LIST._replace(tail="x")], [None]), {}, ValueError, r"teacher_hidden\[0\].tail must be one of"),
    ((X, W, TX, TW), {"chunk_rows": 0}, ValueError, "chunk_rows must be at least 1, got 0"),
    ((X, W, TX, TW, torch.zeros(3).long()), {}, ValueError, r"labels must have shape \[4\], got \[3\]"),
    ((X, W, TX, TW), {"temperature": 0.0}, ValueError, "temperature must be positive"),
    ((X, W, TX, TW), {"ignore_index": 2}, ValueError, "ignore_index must lie outside the classes 0 to 2, got 2"),
    ((X, W, TX, TW), {"num_items": 4, "reduction": "sum"}, ValueError, 'num_items .* reduction="mean"'),
    ((X, W, TX, TW), {"teacher_prior": torch.tensor([1.0, -1.0])}, ValueError, "teacher_prior .* found -1.0"),
    ((X, W, TX, TW), {"backend": "cuda"}, ValueError, "backend must be one of .* got 'cuda'"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "options", "error", "message"), WRONG, ids=[w[3][:40] for w in WRONG])
def test_wrong_input(args: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_amtss_loss(*args, **options)
