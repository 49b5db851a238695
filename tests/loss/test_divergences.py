"""The six divergences, temperatures of teachers, routed rows and top-k lists, on every backend of this machine."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from backends import is_interpreted
from numerics import IGNORED, UNLABELED, Case, Result, assert_within_budget, make_case
from torch import Tensor

from amtss_fast import TopKLogprobs, amtss_loss, quantize_logits
from amtss_fast.loss.options import DIVERGENCES

INF, NAN = math.inf, math.nan
OTHERS = DIVERGENCES[1:]
FINITE = ("jsd", "skew_forward_kl", "skew_reverse_kl", "tvd")
BETAS = {"jsd": (0.5, 0.2), "skew_forward_kl": (0.1,), "skew_reverse_kl": (0.1, 0.7)}


def by_hand(divergence: str, beta: float, p: list[float], q: list[float]) -> float:
    """D(p, q) as its definition has it, with Python floats."""

    def kl(a: list[float], b: list[float]) -> float:
        return sum(x * (math.log(x) - math.log(y)) for x, y in zip(a, b, strict=True) if x > 0)

    def mix(share: float) -> list[float]:
        return [share * x + (1 - share) * y for x, y in zip(p, q, strict=True)]

    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: beta * kl(p, mix(beta)) + (1 - beta) * kl(q, mix(beta)),
        "skew_forward_kl": lambda: kl(p, mix(beta)),
        "skew_reverse_kl": lambda: kl(q, mix(1 - beta)),
        "tvd": lambda: 0.5 * sum(abs(x - y) for x, y in zip(p, q, strict=True)),
    }[divergence]()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_reference_is_the_definition(divergence: str) -> None:
    taus, tau = (1.5, 3.0), 2.0
    for beta in BETAS.get(divergence, (None,)):
        case = make_case(
            9, 6, 2, dtype=torch.float64, special_rows=False, divergence=divergence, divergence_beta=beta,
            temperature=tau, teacher_temperature=taus,
        )  # fmt: skip
        result = case.run("reference")
        q = (case.student / tau).softmax(-1).tolist()
        for k, teacher in enumerate(case.teachers):
            p = (teacher / taus[k]).softmax(-1).tolist()
            expected = torch.tensor([by_hand(divergence, beta or 0, *rows) for rows in zip(p, q, strict=True)])
            torch.testing.assert_close(result.stats.kd[k], expected.double(), rtol=1e-6, atol=1e-9)
            apart = (torch.tensor(p) - torch.tensor(q)).abs().sum(-1).double() * result.stats.weights[k]
            torch.testing.assert_close(result.stats.pull[k], apart, rtol=1e-5, atol=1e-7)
            scale = teacher.std(-1, correction=0)
            torch.testing.assert_close(result.stats.teacher_scale[k], scale, rtol=1e-12, atol=0)
        loss = tau**2 * (result.stats.weights * result.stats.kd).sum(0).mean()
        torch.testing.assert_close(result.loss, loss)


@pytest.mark.parametrize("divergence", OTHERS)
def test_gradcheck(divergence: str) -> None:
    case = make_case(9, 4, 2, dtype=torch.float64, masked=True, weighted=True, divergence=divergence, ce_weight=0.3,
                     teacher_temperature=(1.0, 3.0))  # fmt: skip
    student = case.student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: amtss_loss(s, case.teachers, case.labels, **case.options), (student,))


EXTRAS: list[dict[str, Any]] = [
    {"ce_weight": 0.5, "label_smoothing": 0.1, "masked": True, "weighted": True},
    {"temperature": 1.0, "weighting": "top2_margin", "ce_weight": 0.5, "weight_temperature": 0.0},
    {"teacher_temperature": (0.7, 2.0, 5.0), "weighting": "label_nll", "reduction": "sum"},
]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("n", "c"), [(33, 2), (33, 3), (40, 33), (19, 1000), (5, 5003), (3, 60_001)])
def test_budget(backend: str, divergence: str, n: int, c: int) -> None:
    """Every divergence in every way that a kernel takes, with all options."""
    slow = is_interpreted(backend) and c >= 1000
    if slow and c > 10_000:
        pytest.skip("too slow in the interpreter; 5003 classes take the same way")
    for extra in EXTRAS[:1] if is_interpreted(backend) else EXTRAS:
        for beta in BETAS.get(divergence, (None,)):
            # In the interpreter, enough rows for two programs.
            few = 2 if slow else min(n, 800 // c) if is_interpreted(backend) else n
            case = make_case(few, c, 3, divergence=divergence, divergence_beta=beta, **extra)
            assert_within_budget(case.run(backend), case)


@pytest.mark.parametrize("divergence", OTHERS)
@pytest.mark.parametrize("c", [5, 517])
def test_budget_of_mixed_types(backend: str, divergence: str, c: int) -> None:
    n = 2 if is_interpreted(backend) and c > 100 else 12
    kinds = [torch.float32, torch.bfloat16, torch.float16]
    for dtype in [torch.bfloat16] if is_interpreted(backend) else kinds:
        case = make_case(n, c, 3, dtype=dtype, teacher_dtypes=kinds, divergence=divergence, ce_weight=0.2)
        case.teachers[0] = quantize_logits(case.teachers[0])
        assert_within_budget(case.run(backend), case)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("c", [3, 33, 2000, 20_000])
def test_equal_logits_have_no_gradient(backend: str, divergence: str, c: int) -> None:
    """Exactly, unlike most peers': a student that has arrived stays."""
    if is_interpreted(backend):
        # Chunks of a row, as with more classes.
        c = min(c, 5003)
    n = 2 if is_interpreted(backend) and c > 100 else 6
    logits = 3 * torch.randn(n, c)
    result = Case(logits, [logits], torch.arange(n) % c, {"divergence": divergence}).run(backend)
    assert (result.grad == 0).all()
    assert abs(float(result.loss)) < 1e-6


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("c", [5, 777])
def test_masked_classes(backend: str, divergence: str, c: int) -> None:
    """-inf for the teacher, for the student, and for both: infinite only where the formula is."""
    case = make_case(3, c, 1, special_rows=False, reduction="none", divergence=divergence)
    case.teachers[0][0, 1] = -INF
    case.student[1, 2] = -INF
    case.student[2, 3] = case.teachers[0][2, 3] = -INF
    result = case.run(backend)
    infinite = {"reverse_kl": [True, False, False], "forward_kl": [False, True, False]}.get(divergence, [False] * 3)
    assert result.loss.isinf().tolist() == infinite
    assert result.grad[~result.loss.isinf()].isfinite().all()
    finite = ~torch.tensor(infinite)
    parts = replace(case, student=case.student[finite], teachers=[case.teachers[0][finite]], labels=case.labels[finite])
    assert_within_budget(parts.run(backend), parts)


@pytest.mark.parametrize("divergence", OTHERS)
@pytest.mark.parametrize("c", [3, 777])
def test_nan_stays_in_its_row(backend: str, divergence: str, c: int) -> None:
    case = make_case(4, c, 2, special_rows=False, reduction="none", ce_weight=0.5, divergence=divergence)
    clean = case.run(backend)
    for bad in (case.student, case.teachers[1]):
        kept = bad[2].clone()
        bad[2, c // 2] = NAN
        dirty = case.run(backend)
        bad[2] = kept
        assert dirty.loss[2].isnan()
        assert dirty.grad[2].isnan().all()
        others = torch.arange(4) != 2
        assert torch.equal(dirty.loss[others], clean.loss[others])
        assert torch.equal(dirty.grad[others], clean.grad[others])


@pytest.mark.parametrize("divergence", ["forward_kl", "skew_forward_kl"])
@pytest.mark.parametrize("c", [3, 700])
def test_adding_a_constant_changes_nothing(backend: str, divergence: str, c: int) -> None:
    case = make_case(4, c, 2, divergence=divergence, teacher_temperature=(2.0, 4.0))
    case.student, case.teachers = (case.student * 64).round() / 64, [(t * 64).round() / 64 for t in case.teachers]
    moved = Case(case.student + 1e4, [t - 1e4 for t in case.teachers], case.labels, case.options)
    for a, b in zip(case.run(backend).parts().values(), moved.run(backend).parts().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "tvd"])
@pytest.mark.parametrize("c", [3, 40, 1500])
def test_same_inputs_same_bits(backend: str, divergence: str, c: int) -> None:
    case = make_case(13, c, 2, masked=True, ce_weight=0.5, divergence=divergence)
    if is_interpreted(backend) and c > 100:
        case = make_case(2, c, 2, ce_weight=0.5, divergence=divergence)
    first, threads = case.run(backend), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        same(first, case.run(backend))
    finally:
        torch.set_num_threads(threads)
    # The loss is the same without a gradient, and without the stats.
    loss = amtss_loss(case.student.detach(), case.teachers, case.labels, backend=backend, **case.options)
    assert torch.equal(loss, first.loss)


def same(a: Result, b: Result) -> None:
    for (name, x), y in zip(a.parts().items(), b.parts().values(), strict=True):
        assert torch.equal(x, y), name


def test_compiles_to_one_graph(backend: str) -> None:
    case = make_case(6, 5, 2, divergence="jsd", divergence_beta=0.3, teacher_temperature=(1.0, 2.0), ce_weight=0.5)
    rows = [torch.arange(6), torch.tensor([1, 4])]
    case.teachers[1] = case.teachers[1][rows[1]]
    case.options["teacher_rows"] = rows
    expected = case.run(backend)
    student = case.student.requires_grad_()
    compiled = torch.compile(amtss_loss, fullgraph=True)(
        student, case.teachers, case.labels, backend=backend, **case.options
    )
    assert torch.equal(compiled, expected.loss)
    assert torch.equal(torch.autograd.grad(compiled, student)[0], expected.grad)


# Routed teachers.


def routed(case: Case, rows: list[Tensor | None]) -> tuple[Case, Case]:
    """The case with teachers of these rows alone, and the same with masks."""
    mask = torch.zeros(len(rows), len(case.student), dtype=torch.bool)
    teachers = list(case.teachers)
    for k, own in enumerate(rows):
        mask[k, slice(None) if own is None else own] = True
        if own is not None:
            t = teachers[k]
            teachers[k] = type(t)(*(part[own] for part in t)) if isinstance(t, tuple) else t[own]
    return (
        replace(case, teachers=teachers, options=case.options | {"teacher_rows": rows}),
        replace(case, options=case.options | {"teacher_mask": mask}),
    )


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("c", [3, 50, 700, 9000])
def test_routed_teachers_are_masked_ones(backend: str, divergence: str, c: int) -> None:
    if is_interpreted(backend):
        # Chunks of a row, as with more classes.
        c = min(c, 4500)
    n = 2 if is_interpreted(backend) and c > 100 else 22
    case = make_case(n, c, 4, ce_weight=0.5, divergence=divergence, teacher_dtypes=[torch.float32, torch.bfloat16] * 2)
    case.teachers[2] = quantize_logits(case.teachers[2])
    rows = [torch.arange(0, n, 2), None, torch.arange(1, n, 3), torch.tensor([], dtype=torch.int64)]
    few, masked = routed(case, rows)
    for (name, a), b in zip(few.run(backend).parts().items(), masked.run(backend).parts().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7, msg=name)
    alone = amtss_loss(few.student, few.teachers, few.labels, backend=backend, reduction="none",
                       **{k: v for k, v in few.options.items() if k != "reduction"})  # fmt: skip
    assert alone.isfinite().all()


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([torch.tensor([1, 0]), None], ValueError, r"teacher_rows\[0\] must be ascending.*found 1 before 0"),
        ([torch.tensor([1, 1]), None], ValueError, r"teacher_rows\[0\] must be ascending.*found 1 before 1"),
        ([torch.tensor([0, 9]), None], ValueError, r"teacher_rows\[0\] must hold rows from 0 to 3, found 9"),
        ([torch.tensor([-1, 2]), None], ValueError, r"teacher_rows\[0\] must hold rows from 0 to 3, found -1"),
        (
            [torch.tensor([0]), None],
            ValueError,
            r"teacher_logits\[0\] has shape \[2, 3\], but teacher_rows\[0\] 1 rows",
        ),
        ([torch.tensor([0.0, 1.0]), None], TypeError, r"teacher_rows\[0\] must be int64, got torch.float32"),
        ([torch.tensor([0, 1])], ValueError, "teacher_rows must hold one entry for each of 2 teachers, got 1"),
        (torch.tensor([0, 1]), TypeError, "teacher_rows must be a sequence"),
        ([[0, 1], None], TypeError, r"teacher_rows\[0\] must be a tensor or None, got list"),
    ],
)
def test_wrong_rows_are_named(rows: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        amtss_loss(torch.randn(4, 3), [torch.randn(2, 3), torch.randn(4, 3)], teacher_rows=rows)


def test_temperatures_must_be_as_many_as_teachers() -> None:
    with pytest.raises(
        ValueError, match="teacher_temperature must be a number or hold one for each of 2 teachers, got 3"
    ):
        amtss_loss(torch.randn(4, 3), torch.randn(2, 4, 3), teacher_temperature=[1.0, 2.0, 3.0])


def test_temperature_of_a_teacher_divides_its_logits(backend: str) -> None:
    case = make_case(8, 7, 2)
    # Powers of two divide exactly.
    cooled = replace(case, teachers=[case.teachers[0] / 2, case.teachers[1] / 4], options={"teacher_temperature": 1.0})
    apart = replace(case, options={"teacher_temperature": [2.0, 4.0]})
    a, b = cooled.run(backend).parts(), apart.run(backend).parts()
    for name in ("loss", "grad", "weights", "margins", "kd", "pull"):
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-7)


# Top-k lists.


def listed(logits: Tensor, k: int, tail: str = "bucket", temperature: float = 1.0) -> TopKLogprobs:
    values, indices = (logits / temperature).log_softmax(-1).topk(k, dim=-1)
    order = torch.randperm(k)
    return TopKLogprobs(indices[:, order], values[:, order], tail)  # type: ignore[arg-type]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_the_whole_list_is_the_dense_teacher(backend: str, divergence: str, tail: str) -> None:
    n = 4 if is_interpreted(backend) else 11
    case = make_case(n, 9, 2, temperature=1.0, divergence=divergence, ce_weight=0.5)
    dense = case.run(backend).parts()
    case.teachers[1] = listed(case.teachers[1], 9, tail)
    for (name, a), b in zip(case.run(backend).parts().items(), dense.values(), strict=True):
        if name != "teacher_scale":
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_rest_is_one_class(divergence: str) -> None:
    """By the definition, over k + 1 classes; never negative, whatever is in the list."""
    student, teacher = torch.randn(7, 30, dtype=torch.float64), torch.randn(7, 30, dtype=torch.float64)
    top = listed(teacher, 5)
    _, stats = amtss_loss(student, [top], divergence=divergence, temperature=1.0, return_stats=True)
    beta = BETAS.get(divergence, (0.0,))[0]
    for n in range(7):
        p = top.logprobs[n].exp().tolist()
        q = student[n].softmax(-1)[top.indices[n]].tolist()
        expected = by_hand(divergence, beta, [*p, 1 - sum(p)], [*q, 1 - sum(q)])
        assert stats.kd[0, n] == pytest.approx(expected, rel=1e-9)
        assert stats.kd[0, n] >= 0


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("c", [12, 1200, 30_001])
def test_budget_of_lists(backend: str, divergence: str, c: int) -> None:
    """Lists that overlap, beside dense teachers: of some rows, in 16 bits, with padding, without some labels."""
    slow = is_interpreted(backend)
    if slow and c != 1200:
        pytest.skip("too slow in the interpreter; 1200 classes take the same way")
    n = 4 if slow else 21
    tails = ["bucket"] if divergence == "reverse_kl" else ["bucket", "renormalize"]
    for tail in tails:
        for certainty in (1000,) if slow or c > 10_000 else (1, 30, 1000):
            # A student that is certain leaves the rest a tiny probability, or one below that of a float.
            temperature = 1.0 if tail == "bucket" else 2.0
            case = make_case(n, c, 4, temperature=temperature, divergence=divergence, ce_weight=0.5, masked=True,
                             weighted=True, reduction="sum")  # fmt: skip
            case.student = case.teachers[0] * certainty
            case.teachers[0] = listed(case.teachers[0], 8, tail, temperature)
            padded = listed(case.teachers[1], 5, tail, temperature)
            padded.logprobs[::2, 1] = padded.logprobs[3] = -INF
            rows = torch.arange(0, n, 2)
            case.teachers[1] = TopKLogprobs(padded.indices[rows], padded.logprobs[rows], padded.tail)
            case.teachers[2] = quantize_logits(case.teachers[2])
            case.teachers[3] = listed(case.teachers[3], 12, tail, temperature).half()
            case.options["teacher_rows"] = [None, rows, None, None]
            if tail == "renormalize":
                # Without any class there is no softmax.
                case.options["teacher_mask"][1, 3] = False
            assert_within_budget(case.run(backend), case)


@pytest.mark.parametrize("weighting", ["label_margin", "top2_margin", "label_nll"])
def test_lists_alone(backend: str, weighting: str) -> None:
    slow = is_interpreted(backend)
    n, c, length = (2, 300, 8) if slow else (15, 5000, 64)
    for dtype in (torch.bfloat16,) if slow else (torch.float32, torch.bfloat16, torch.float16):
        for divergence in ("forward_kl", "jsd"):
            case = make_case(n, c, 2, dtype=dtype, temperature=1.0, divergence=divergence, weighting=weighting)
            case.teachers = [listed(t.float(), length) for t in case.teachers]
            # Strides of another layout.
            case.student = case.student.T.contiguous().T
            assert_within_budget(case.run(backend), case)
            # Both threads, and no gradient: the same bits.
            same(case.run(backend), case.run(backend))
            loss = amtss_loss(case.student, case.teachers, case.labels, backend=backend, **case.options)
            assert torch.equal(loss, case.run(backend).loss)


def test_gradcheck_of_lists() -> None:
    case = make_case(5, 8, 2, dtype=torch.float64, temperature=1.0, ce_weight=0.2)
    for divergence in DIVERGENCES:
        teachers = [listed(case.teachers[0], 3), listed(case.teachers[1], 4, "renormalize"), case.teachers[1]]
        if divergence == "reverse_kl":
            # Infinite, where the teacher has no mass.
            teachers.pop(1)

        def loss(s: Tensor, teachers: Any = teachers, divergence: Any = divergence) -> Tensor:
            return amtss_loss(s, teachers, case.labels, divergence=divergence, temperature=1.0, ce_weight=0.2)

        assert torch.autograd.gradcheck(loss, (case.student.requires_grad_(),))


def test_padding_order_and_16_bits_of_lists() -> None:
    student, teacher = torch.randn(6, 50), torch.randn(6, 50)
    top = listed(teacher, 8)
    loss = amtss_loss(student, [top], temperature=1.0)
    padding = torch.full((6, 2), -INF)
    padded = TopKLogprobs(
        torch.cat([torch.full((6, 2), 10**9), top.indices], -1).int(), torch.cat([padding, top.logprobs], -1)
    )  # fmt: skip
    torch.testing.assert_close(amtss_loss(student, [padded], temperature=1.0), loss)
    half = top.half()
    assert (half.indices.dtype, half.logprobs.dtype) == (torch.int32, torch.float16)
    torch.testing.assert_close(amtss_loss(student, [half], temperature=1.0), loss, rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"indices": torch.tensor([[0, 1], [2, 2]])},
            ValueError,
            r"teacher_logits\[0\].indices lists class 2 twice in row 1",
        ),
        (
            {"indices": torch.tensor([[0, 1], [2, 9]])},
            ValueError,
            r"teacher_logits\[0\].indices\[1, 1\] = 9 is no class",
        ),
        ({"indices": torch.tensor([[0, -1], [2, 1]])}, ValueError, r"indices\[0, 1\] = -1 is no class from 0 to 4"),
        ({"logprobs": torch.tensor([[-1.0, -1.0], [-0.5, -0.6]])}, ValueError, "of row 1 add up to a mass of 1.15534"),
        (
            {"indices": torch.tensor([[0.0, 1.0], [2.0, 1.0]])},
            TypeError,
            "indices must be int32 or int64, got torch.float32",
        ),
        ({"indices": torch.tensor([[0], [1]])}, ValueError, r"indices must have shape \[2, 2\], got \[2, 1\]"),
        (
            {"tail": "rest"},
            ValueError,
            r"teacher_logits\[0\].tail must be one of \('bucket', 'renormalize'\), got 'rest'",
        ),
        ({"logprobs": None}, TypeError, r"teacher_logits\[0\].logprobs must be a tensor, got NoneType"),
    ],
)
def test_wrong_lists_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    top = TopKLogprobs(torch.tensor([[0, 1], [2, 1]]), torch.tensor([[-1.0, -1.0], [-1.0, -2.0]]))
    with pytest.raises(error, match=message):
        amtss_loss(torch.randn(2, 5), [top._replace(**change)], temperature=1.0)


def test_a_bucket_has_no_other_temperature() -> None:
    top = TopKLogprobs(torch.tensor([[0, 1]]), torch.tensor([[-1.0, -1.0]]))
    for options in ({}, {"temperature": 1.0, "teacher_temperature": 2.0}):
        with pytest.raises(ValueError, match=r'must be 1 where teacher_logits\[0\] has tail="bucket", got 2.0'):
            amtss_loss(torch.randn(1, 5), [top], **options)
    assert amtss_loss(torch.randn(1, 5), [top._replace(tail="renormalize")]).isfinite()


def test_rows_without_labels_and_ignored_ones(backend: str) -> None:
    case = make_case(8, 6, 2, divergence="jsd")
    case.labels = torch.tensor([IGNORED, UNLABELED, 0, 1, IGNORED, UNLABELED, 2, 3])
    result = case.run(backend)
    assert (result.grad[[0, 4]] == 0).all()
    assert all((stat[..., [0, 4]] == 0).all() for stat in result.stats)
    assert_within_budget(result, case)
