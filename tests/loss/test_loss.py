"""The public loss on every backend of this machine, against the float64 reference and against independent formulas."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backends import available_backends, is_interpreted
from numerics import IGNORED, UNLABELED, Case, assert_within_budget, make_case

from amtss_fast import AMTSSLoss, AMTSSStats, LossOptions, amtss_loss
from amtss_fast.loss.contract import LossInputs
from amtss_fast.loss.options import OPTION_NAMES, WEIGHTINGS

PER_ROW = ("teacher_prior", "teacher_mask")
INF, NAN = math.inf, math.nan
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "weighting": "top2_margin"},
    {"temperature": 4.0, "weighting": "label_nll", "weight_temperature": 0.5},
    {"weight_temperature": 0.0, "ce_weight": 0.5},
    {"weight_temperature": INF, "ce_weight": 0.3, "label_smoothing": 0.1},
    {"kd_weight": 0.0, "ce_weight": 1.0, "label_smoothing": 0.2},
    {"kd_weight": 0.7, "ce_weight": 0.3, "reduction": "sum"},
    {"reduction": "none", "temperature": 0.7},
    {"num_items": 17.5, "ce_weight": 1.0},
]


# The mathematics, in float64.


def by_hand(case: Case) -> tuple[list[float], list[list[float]]]:
    """Loss of each row and weights, from the formulas with Python floats: slow, and shares no code with the package."""
    o = {
        "temperature": 2.0,
        "weighting": "label_margin",
        "weight_temperature": 1.0,
        "kd_weight": 1.0,
        "ce_weight": 0.0,
    }
    o |= {"label_smoothing": 0.0} | case.options
    tau, beta = o["temperature"], o["weight_temperature"]

    def softmax(logits: list[float], t: float) -> list[float]:
        top = max(logits)
        e = [math.exp((x - top) / t) for x in logits]
        return [x / sum(e) for x in e]

    losses, all_weights = [], []
    for n, y in enumerate(case.labels.tolist()):
        s = case.student[n].tolist()
        q, q1 = softmax(s, tau), softmax(s, 1.0)
        prior, mask = o.get("teacher_prior"), o.get("teacher_mask")
        mass, kls = [], []
        for k, teacher in enumerate(case.teachers):
            p = softmax(teacher[n].tolist(), tau)
            target = p.index(max(p)) if y == UNLABELED else y
            ranked = sorted(p)
            if y == IGNORED:
                margin = 0.0
            elif o["weighting"] == "label_margin":
                margin = p[target] - max(x for c, x in enumerate(p) if c != target)
            elif o["weighting"] == "top2_margin":
                margin = ranked[-1] - ranked[-2]
            else:
                margin = math.log(p[target])
            alpha = 1.0 if prior is None else float(prior[k, n])
            alpha *= 1.0 if mask is None else float(mask[k, n])
            mass.append((alpha, margin))
            kls.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
        if beta == 0:
            best = max((m for a, m in mass if a > 0), default=None)
            raw = [0.0] * len(mass)
            if best is not None:
                raw[next(i for i, (a, m) in enumerate(mass) if a > 0 and m == best)] = 1.0
        else:
            raw = [a * math.exp(0 if beta == INF else m / beta) for a, m in mass]
        total = sum(raw)
        weights = [0.0 if total == 0 or y == IGNORED else x / total for x in raw]
        loss = o["kd_weight"] * tau**2 * sum(w * kl for w, kl in zip(weights, kls, strict=True))
        if y >= 0 and o["ce_weight"]:
            e = o["label_smoothing"]
            nll = [-math.log(x) for x in q1]
            loss += o["ce_weight"] * ((1 - e) * nll[y] + e * sum(nll) / len(nll))
        r = 1.0 if o.get("sample_weight") is None else float(o["sample_weight"][n])
        losses.append(0.0 if y == IGNORED else r * loss)
        all_weights.append(weights)
    return losses, all_weights


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("extras", [{}, {"masked": True, "weighted": True}])
def test_reference_is_the_formula(options: dict[str, Any], extras: dict[str, Any]) -> None:
    case = make_case(23, 5, 3, dtype=torch.float64, **extras, **options)
    losses, weights = by_hand(case)
    counted = sum(y != IGNORED for y in case.labels.tolist())
    loss, stats = amtss_loss(
        case.student, case.teachers, case.labels, backend="reference", return_stats=True, **case.options
    )
    expected = torch.tensor(losses, dtype=torch.float64)
    if options.get("reduction") == "sum":
        expected = expected.sum()
    elif options.get("reduction") != "none":
        expected = expected.sum() / options.get("num_items", counted)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(stats.weights.T, torch.tensor(weights, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(options: dict[str, Any], masked: bool) -> None:
    case = make_case(9, 4, 2, dtype=torch.float64, masked=masked, weighted=masked, **options)
    student = case.student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: amtss_loss(s, case.teachers, case.labels, **case.options), (student,))


def test_one_teacher_is_ordinary_distillation(backend: str) -> None:
    case = make_case(33, 11, 1, special_rows=False)
    log_q = F.log_softmax(case.student / 2, -1)
    log_p = F.log_softmax(case.teachers[0] / 2, -1)
    expected = 4 * F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    torch.testing.assert_close(amtss_loss(case.student, case.teachers, case.labels, backend=backend), expected)


def test_ce_alone_is_cross_entropy(backend: str) -> None:
    case = make_case(33, 11, 2, special_rows=False)
    loss = amtss_loss(
        case.student,
        case.teachers,
        case.labels,
        kd_weight=0,
        ce_weight=1,
        label_smoothing=0.1,
        backend=backend,
    )
    torch.testing.assert_close(loss, F.cross_entropy(case.student, case.labels, label_smoothing=0.1))


# Every backend within the error budget.


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("n", "c", "k"), [(33, 2, 2), (65, 3, 3), (40, 33, 5), (19, 1000, 3), (5, 5003, 2)])
def test_budget(backend: str, options: dict[str, Any], n: int, c: int, k: int) -> None:
    if is_interpreted(backend) and c >= 1000:
        # A program takes one row of these.
        n = 2
    elif is_interpreted(backend):
        # Enough for two programs.
        n = min(n, 800 // c)
    case = make_case(n, c, k, **options)
    assert_within_budget(case.run(backend), case)
    case = make_case(n, c, k, masked=True, weighted=True, seed=1, **options)
    grad_output = torch.rand(n) if options.get("reduction") == "none" else torch.tensor(0.37)
    assert_within_budget(case.run(backend, grad_output), case, grad_output)


def mixed_types() -> list[Any]:
    """All combinations; in Triton's interpreter those of an orthogonal array, in which each two values meet."""
    teachers = ([torch.float32] * 3, [torch.bfloat16] * 3, [torch.float32, torch.bfloat16, torch.float16])
    sizes, dtypes = (3, 517, 3001), (torch.float32, torch.bfloat16, torch.float16)
    places = itertools.product(range(len(WEIGHTINGS)), range(3), range(3), range(3))
    return [
        (backend, WEIGHTINGS[w], dtypes[d], teachers[t], sizes[c])
        for backend, (w, d, t, c) in itertools.product(available_backends(), places)
        if not is_interpreted(backend) or (t, c) == ((w + d) % 3, (w + 2 * d) % 3)
    ]


@pytest.mark.parametrize(("backend", "weighting", "dtype", "teacher_dtypes", "c"), mixed_types())
def test_budget_of_mixed_types(
    backend: str, weighting: str, dtype: torch.dtype, teacher_dtypes: list[torch.dtype], c: int
) -> None:
    n = 3 if is_interpreted(backend) and c > 3 else 21
    case = make_case(n, c, 3, dtype=dtype, teacher_dtypes=teacher_dtypes, weighting=weighting, ce_weight=0.5)
    assert_within_budget(case.run(backend), case)


@pytest.mark.parametrize("k", [1, 2, 8, 17, 64])
@pytest.mark.parametrize("c", [3, 300])
def test_budget_of_many_teachers(backend: str, k: int, c: int) -> None:
    n = 3 if is_interpreted(backend) and c > 3 else 18
    case = make_case(n, c, k, ce_weight=0.2)
    assert_within_budget(case.run(backend), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_budget_at_250002_classes(backend: str, dtype: torch.dtype) -> None:
    # In the interpreter, fewer chunks of the same kernels.
    n, c = (1, 20_011) if is_interpreted(backend) else (2, 250_002)
    case = make_case(n, c, 2, dtype=dtype, special_rows=False, ce_weight=0.5, label_smoothing=0.1)
    assert_within_budget(case.run(backend), case)


@pytest.mark.parametrize("shift", [1e4, -1e4])
@pytest.mark.parametrize("c", [3, 700])
def test_adding_a_constant_changes_nothing(backend: str, shift: float, c: int) -> None:
    # Multiples of 1/64 stay exact when the constant is added, so that only the loss can make an error.
    case = make_case(16, c, 3, ce_weight=0.5)
    case.student = (case.student * 64).round() / 64
    case.teachers = [(t * 64).round() / 64 for t in case.teachers]
    moved = Case(case.student + shift, [t - shift for t in case.teachers], case.labels, case.options)
    for a, b in zip(case.run(backend).parts().values(), moved.run(backend).parts().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("c", [4, 600])
def test_stacked_and_separate_teachers_are_the_same(backend: str, c: int) -> None:
    case = make_case(12, c, 3, masked=True)
    stacked = Case(case.student, torch.stack(case.teachers), case.labels, case.options)
    for a, b in zip(case.run(backend).parts().values(), stacked.run(backend).parts().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("c", [3, 40, 700])
def test_any_strides_and_offsets(backend: str, c: int) -> None:
    case = make_case(14, c, 2, masked=True, weighted=True, ce_weight=0.5)
    expected = case.run(backend)

    def spaced(t: torch.Tensor) -> torch.Tensor:
        wide = torch.full((t.shape[0] * 2 + 1, t.shape[1] * 3 + 2), NAN)
        view = wide[1::2, 2::3][: t.shape[0], : t.shape[1]]
        view.copy_(t)
        return view

    labels = torch.stack([case.labels, case.labels + 1], -1)[:, 0]
    options = {name: torch.stack([v, v], -1)[..., 0] for name, v in case.options.items() if torch.is_tensor(v)}
    strided = Case(
        spaced(case.student),
        [case.teachers[0].T.contiguous().T, spaced(case.teachers[1])],
        labels,
        case.options | options,
    )
    for (name, a), b in zip(expected.parts().items(), strided.run(backend).parts().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("c", [3, 900])
def test_expanded_inputs(backend: str, c: int) -> None:
    row = make_case(1, c, 2, special_rows=False)
    case = Case(row.student.expand(9, c), [t.expand(9, c) for t in row.teachers], row.labels.expand(9))
    loss, stats = amtss_loss(
        case.student, case.teachers, case.labels, reduction="none", return_stats=True, backend=backend
    )
    assert torch.equal(loss, loss[:1].expand(9))
    assert torch.equal(stats.weights, stats.weights[:, :1].expand(2, 9))


# Rows that are special.


@pytest.mark.parametrize("c", [3, 800])
def test_ignored_rows_are_dropped(backend: str, c: int) -> None:
    case = make_case(20, c, 3, special_rows=False, ce_weight=0.4)
    keep = torch.arange(20) % 3 != 0
    part = Case(case.student[keep], [t[keep] for t in case.teachers], case.labels[keep], case.options)
    case.labels[~keep] = IGNORED
    case.student[~keep] = NAN
    for teacher in case.teachers:
        teacher[~keep] = NAN
    whole, alone = case.run(backend), part.run(backend)
    torch.testing.assert_close(whole.loss, alone.loss)
    torch.testing.assert_close(whole.grad[keep], alone.grad)
    assert (whole.grad[~keep] == 0).all()
    for stat in whole.stats:
        assert (stat[..., ~keep] == 0).all()


@pytest.mark.parametrize("n", [0, 5])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_row_that_counts(backend: str, n: int, reduction: str) -> None:
    student = torch.randn(n, 7, requires_grad=True)
    loss = amtss_loss(
        student,
        torch.randn(2, n, 7),
        torch.full((n,), IGNORED),
        ce_weight=1,
        reduction=reduction,
        backend=backend,
    )
    assert (loss == 0).all()
    loss.sum().backward()
    assert student.grad.shape == (n, 7)
    assert (student.grad == 0).all()


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_no_labels_means_all_unlabeled(backend: str, weighting: str) -> None:
    case = make_case(11, 6, 3, weighting=weighting, ce_weight=0.5)
    without = Case(case.student, case.teachers, None, case.options).run(backend)
    unlabeled = Case(case.student, case.teachers, torch.full((11,), UNLABELED), case.options).run(backend)
    for a, b in zip(without.parts().values(), unlabeled.parts().values(), strict=True):
        assert torch.equal(a, b)
    if weighting == "label_margin":
        top2 = Case(case.student, case.teachers, None, case.options | {"weighting": "top2_margin"}).run(backend)
        torch.testing.assert_close(without.stats.margins, top2.stats.margins)


@pytest.mark.parametrize("how", ["mask", "prior of the row", "prior"])
@pytest.mark.parametrize("c", [3, 650])
def test_a_teacher_that_does_not_teach_is_not_looked_at(backend: str, how: str, c: int) -> None:
    case = make_case(13, c, 3, special_rows=False)
    absent = torch.zeros(3, 13, dtype=torch.bool)
    absent[1] = True if how == "prior" else torch.arange(13) % 2 == 0
    options = {
        "mask": {"teacher_mask": ~absent},
        "prior of the row": {"teacher_prior": (~absent).float()},
        "prior": {"teacher_prior": torch.tensor([1.0, 0.0, 1.0])},
    }[how]
    clean = Case(case.student, case.teachers, case.labels, options).run(backend)
    dirty_teacher = case.teachers[1].clone()
    dirty_teacher[absent[1]] = NAN
    dirty = Case(case.student, [case.teachers[0], dirty_teacher, case.teachers[2]], case.labels, options).run(backend)
    for a, b in zip(clean.parts().values(), dirty.parts().values(), strict=True):
        assert torch.equal(a, b)
    for stat in clean.stats[:3]:
        assert (stat[absent] == 0).all()
    torch.testing.assert_close(clean.stats.weights.sum(0), torch.ones(13))


@pytest.mark.parametrize("c", [3, 650])
def test_a_row_without_any_teacher_keeps_its_cross_entropy(backend: str, c: int) -> None:
    case = make_case(10, c, 2, special_rows=False, reduction="none", kd_weight=2.0, ce_weight=0.5)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[:, 4] = False
    case.options["teacher_mask"] = mask
    result = case.run(backend)
    torch.testing.assert_close(result.loss[4], 0.5 * F.cross_entropy(case.student[4], case.labels[4]))
    assert_within_budget(result, case)
    case.labels[4] = UNLABELED
    result = case.run(backend)
    assert result.loss[4] == 0
    assert (result.grad[4] == 0).all()


@pytest.mark.parametrize("c", [3, 650])
def test_a_sample_weight_of_zero_takes_the_row_out(backend: str, c: int) -> None:
    case = make_case(8, c, 2, special_rows=False)
    case.student[3] = NAN
    weight = torch.ones(8)
    weight[3] = 0
    result = Case(case.student, case.teachers, case.labels, {"sample_weight": weight}).run(backend)
    keep = torch.arange(8) != 3
    part = Case(case.student[keep], [t[keep] for t in case.teachers], case.labels[keep], {"num_items": 8}).run(backend)
    torch.testing.assert_close(result.loss, part.loss)
    assert (result.grad[3] == 0).all()


def test_ties_at_hard_choice_go_to_the_lowest_teacher(backend: str) -> None:
    teacher = torch.randn(6, 5)
    _, stats = amtss_loss(
        torch.randn(6, 5), [teacher, teacher, teacher], torch.arange(6) % 5, weight_temperature=0.0,
        teacher_mask=torch.tensor([[False], [True], [True]]).expand(3, 6), return_stats=True, backend=backend,
    )  # fmt: skip
    assert torch.equal(stats.weights, torch.tensor([[0.0], [1.0], [0.0]]).expand(3, 6))


@pytest.mark.parametrize("beta", [0.0, 1.0, INF])
def test_teachers_that_exclude_the_label_tie(backend: str, beta: float) -> None:
    teachers = torch.randn(2, 4, 5)
    teachers[:, :, 2] = -INF
    prior = torch.tensor([1.0, 3.0])
    _, stats = amtss_loss(
        torch.randn(4, 5), teachers, torch.full((4,), 2), weighting="label_nll", weight_temperature=beta,
        teacher_prior=prior, return_stats=True, backend=backend,
    )  # fmt: skip
    expected = torch.tensor([1.0, 0.0]) if beta == 0 else prior / 4
    assert torch.equal(stats.weights, expected.unsqueeze(-1).expand(2, 4))
    assert (stats.margins == -INF).all()


# Infinities and NaN.


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("c", [5, 777])
def test_masked_classes(backend: str, weighting: str, c: int) -> None:
    case = make_case(16, c, 3, weighting=weighting, special_rows=False)
    case.labels %= c - 2
    case.student[:, -1] = -INF
    for teacher in case.teachers:
        teacher[:, -1] = -INF
    case.teachers[0][:, -2] = -INF
    result = case.run(backend)
    assert result.loss.isfinite()
    assert (result.grad[:, -1] == 0).all()
    assert_within_budget(result, case)


@pytest.mark.parametrize("c", [5, 777])
def test_student_excludes_what_a_teacher_knows(backend: str, c: int) -> None:
    case = make_case(6, c, 2, special_rows=False, reduction="none")
    case.student[1, 2] = -INF
    result = case.run(backend)
    assert result.loss[1] == INF
    assert result.loss[[0, 2, 3, 4, 5]].isfinite().all()
    assert result.grad.isfinite().all()
    assert_within_budget(result, case)
    p = torch.stack([F.softmax(t[1] / 2, -1)[2] for t in case.teachers])
    torch.testing.assert_close(result.grad[1, 2], -2 * (result.stats.weights[:, 1] * p).sum())


def test_a_teacher_of_weight_zero_adds_nothing_even_if_infinite(backend: str) -> None:
    student = torch.tensor([[1.0, 0.0, -INF]])
    knows, excludes = torch.tensor([[1.0, 0.0, 0.5]]), torch.tensor([[9.0, 0.0, -INF]])
    loss = amtss_loss(student, [knows, excludes], torch.tensor([0]), weight_temperature=0.0, backend=backend)
    torch.testing.assert_close(loss, amtss_loss(student, [excludes], torch.tensor([0]), backend=backend))


@pytest.mark.parametrize("who", ["student", "teacher", "student all -inf", "teacher all -inf"])
@pytest.mark.parametrize("c", [3, 777])
@pytest.mark.parametrize("beta", [0.0, 1.0, INF])
def test_nan_stays_in_its_row(backend: str, who: str, c: int, beta: float) -> None:
    case = make_case(9, c, 2, special_rows=False, reduction="none", ce_weight=0.5, weight_temperature=beta)
    clean = case.run(backend)
    bad = case.student if who.startswith("student") else case.teachers[1]
    if who.endswith("-inf"):
        bad[4] = -INF
    else:
        bad[4, c // 2] = NAN
    dirty = case.run(backend)
    assert dirty.loss[4].isnan()
    assert dirty.grad[4].isnan().all()
    others = torch.arange(9) != 4
    assert torch.equal(dirty.loss[others], clean.loss[others])
    assert torch.equal(dirty.grad[others], clean.grad[others])


@pytest.mark.parametrize("c", [3, 33, 2000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_student_equal_to_its_teachers_has_no_gradient(backend: str, c: int, dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(12, c)).to(dtype)
    result = Case(logits, [logits], torch.arange(12) % c).run(backend)
    assert (result.grad == 0).all()
    assert abs(float(result.loss)) < 1e-6
    result = Case(logits, [logits] * 3, torch.arange(12) % c).run(backend)
    assert float(result.grad.abs().max()) < 1e-6


# Gradients.


@pytest.mark.parametrize("c", [3, 600])
def test_gradient_of_each_row_with_reduction_none(backend: str, c: int) -> None:
    case = make_case(15, c, 2, reduction="none", ce_weight=0.3)
    grad_output = torch.randn(15)
    result = case.run(backend, grad_output)
    summed = Case(case.student, case.teachers, case.labels, case.options | {"reduction": "sum"}).run(backend)
    torch.testing.assert_close(result.grad, summed.grad * grad_output.unsqueeze(-1))


def test_backward_twice_through_a_kept_graph(backend: str) -> None:
    case = make_case(7, 5, 2)
    student = case.student.requires_grad_()
    loss = 3 * amtss_loss(student, case.teachers, case.labels, backend=backend)
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    first = first.clone()
    (second,) = torch.autograd.grad(loss, student)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, 3 * case.run(backend).grad)


@pytest.mark.parametrize("splits", [(32,), (8, 8, 8, 8), (1, 30, 1), (5, 27)])
def test_splitting_a_batch_changes_nothing(backend: str, splits: tuple[int, ...]) -> None:
    case = make_case(32, 9, 3, ce_weight=0.5)
    whole = case.run(backend)
    num_items = (case.labels != IGNORED).sum()
    student = case.student.requires_grad_()
    total = torch.zeros(())
    for rows in torch.arange(32).split(list(splits)):
        loss = amtss_loss(
            student[rows], [t[rows] for t in case.teachers], case.labels[rows], ce_weight=0.5, num_items=num_items,
            backend=backend,
        )  # fmt: skip
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, whole.loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(student.grad, whole.grad, rtol=1e-6, atol=1e-7)


def test_a_scaled_float16_loss_does_not_underflow(backend: str) -> None:
    n = 4 if is_interpreted(backend) else 64
    case = make_case(n, 20_000, 1, dtype=torch.float16, special_rows=False, spread=0.5)
    scale = torch.tensor(2.0**20)
    result = case.run(backend, scale)
    exact = case.exact(scale)
    assert float((result.grad == 0).float().mean()) < 1e-3
    torch.testing.assert_close(result.grad.double(), exact.grad, rtol=2e-3, atol=1e-5)


def test_teachers_and_weights_carry_no_gradient(backend: str) -> None:
    teachers = torch.randn(2, 4, 3, requires_grad=True)
    prior = torch.rand(2, requires_grad=True)
    student = torch.randn(4, 3, requires_grad=True)
    loss, stats = amtss_loss(student, teachers, None, teacher_prior=prior, return_stats=True, backend=backend)
    assert not any(stat.requires_grad for stat in stats)
    loss.backward()
    assert teachers.grad is None
    assert prior.grad is None


def test_no_gradient_wanted_none_computed(backend: str) -> None:
    case = make_case(5, 4, 2)
    assert not amtss_loss(case.student, case.teachers, case.labels, backend=backend).requires_grad
    with torch.no_grad():
        loss = amtss_loss(case.student.requires_grad_(), case.teachers, case.labels, backend=backend)
    assert not loss.requires_grad


def test_second_derivative_is_refused(backend: str) -> None:
    case = make_case(5, 4, 2)
    student = case.student.requires_grad_()
    loss = amtss_loss(student, case.teachers, case.labels, backend=backend)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, student, create_graph=True)


def test_the_loss_may_be_changed_in_place(backend: str) -> None:
    case = make_case(5, 4, 2)
    student = case.student.requires_grad_()
    loss = amtss_loss(student, case.teachers, case.labels, backend=backend)
    (twice,) = torch.autograd.grad(2 * loss, student, retain_graph=True)
    loss *= 2
    (in_place,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(in_place, twice, rtol=0, atol=0)


def test_same_inputs_same_bits(backend: str) -> None:
    case = make_case(20, 301, 3, masked=True, ce_weight=0.5)
    first = case.run(backend)
    threads = torch.get_num_threads()
    try:
        for n in (threads,) if backend == "triton" else (1, 2, threads):
            torch.set_num_threads(n)
            for a, b in zip(first.parts().values(), case.run(backend).parts().values(), strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(threads)


# The operator.


def operator_arguments(case: Case, need_grad: bool, need_stats: bool, backend: str | None) -> tuple[Any, ...]:
    o = {name: value for name, value in case.options.items() if name in OPTION_NAMES}
    tensors = {name: value for name, value in case.options.items() if name not in OPTION_NAMES}
    nothing = dict.fromkeys(LossInputs._fields[2:])
    lists = {name: [] for name in LossInputs._fields[2:] if name.startswith("teacher_") and name not in PER_ROW}
    inputs = LossInputs(case.student, case.teachers, **nothing | lists | {"labels": case.labels} | tensors)
    options = LossOptions(ce_weight=0.5, label_smoothing=0.1, **o)
    return *inputs, *options.values(len(case.teachers)), need_grad, need_stats, backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("need_grad", "need_stats"), [(True, True), (True, False), (False, False)])
def test_opcheck(backend: str, dtype: torch.dtype, reduction: str, need_grad: bool, need_stats: bool) -> None:
    # With every option that is not a number.
    case = make_case(6, 5, 2, dtype=dtype, masked=True, weighted=True, reduction=reduction, divergence="jsd",
                     teacher_temperature=(1.0, 3.0))  # fmt: skip
    torch.library.opcheck(torch.ops.amtss_fast.amtss_loss, operator_arguments(case, need_grad, need_stats, backend))


@pytest.mark.parametrize("return_stats", [False, True])
@pytest.mark.parametrize("extras", [{}, {"masked": True, "weighted": True, "reduction": "none"}])
def test_compiles_to_one_graph(backend: str, return_stats: bool, extras: dict[str, Any]) -> None:
    case = make_case(12, 7, 3, ce_weight=0.5, **extras)
    torch._dynamo.reset()

    def step(student: torch.Tensor) -> Any:
        out = amtss_loss(
            2 * student,
            case.teachers,
            case.labels,
            return_stats=return_stats,
            backend=backend,
            **case.options,
        )
        return (out[0].sum(), out[1]) if return_stats else out.sum()

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        student = case.student.clone().requires_grad_()
        out = function(student)
        loss = out[0] if return_stats else out
        loss.backward()
        results.append([loss, student.grad, *(out[1] if return_stats else ())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_by_inductor_in_a_fresh_process() -> None:
    script = """
import torch
from amtss_fast import amtss_loss
weight = torch.randn(8, 5, requires_grad=True)
x, teachers, labels = torch.randn(6, 8), torch.randn(3, 6, 5), torch.tensor([0, 4, -1, -100, 2, 1])
def step(x):
    return amtss_loss(x @ weight, teachers, labels, ce_weight=0.5)
eager = step(x); (g1,) = torch.autograd.grad(eager, weight)
fused = torch.compile(step, fullgraph=True)(x); (g2,) = torch.autograd.grad(fused, weight)
torch.testing.assert_close(eager, fused); torch.testing.assert_close(g1, g2)
print("equal")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "equal", done.stderr


def test_one_compilation_serves_every_batch_size(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda s, t, y: amtss_loss(s, t, y, backend=backend), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (4, 7, 9, 30):
            student = torch.randn(n, 6, requires_grad=True)
            compiled(student, torch.randn(2, n, 6), torch.zeros(n, dtype=torch.int64)).backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_logits_in_their_type(backend: str, dtype: torch.dtype) -> None:
    case = make_case(9, 6, 2)
    expected = case.run(backend)
    with torch.autocast("cpu", dtype=dtype):
        loss = amtss_loss(case.student, case.teachers, case.labels, backend=backend)
    assert torch.equal(loss, expected.loss)


# The module, and wrong input.


def test_module_is_the_function() -> None:
    case = make_case(10, 4, 3, masked=True, weighted=True)
    options: dict[str, Any] = {"temperature": 3.0, "weighting": "top2_margin", "ce_weight": 0.2}
    module = AMTSSLoss(return_stats=True, **options)
    loss, stats = module(case.student, case.teachers, case.labels, **case.options)
    expected, expected_stats = amtss_loss(
        case.student, case.teachers, case.labels, return_stats=True, **options, **case.options
    )
    assert torch.equal(loss, expected)
    assert isinstance(stats, AMTSSStats)
    assert all(itertools.starmap(torch.equal, zip(stats, expected_stats, strict=True)))
    assert "temperature=3.0" in repr(module)
    with pytest.raises(ValueError, match="temperature"):
        AMTSSLoss(temperature=0)


S, T, Y = torch.zeros(4, 3), torch.zeros(2, 4, 3), torch.tensor([0, 1, 2, 0])
WRONG: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ((torch.zeros(2, 4, 3), T, Y), {}, ValueError, r"student_logits must be \[N, C\].*\[2, 4, 3\]"),
    ((S, torch.zeros(4, 3), Y), {}, ValueError, r"teacher_logits must be \[K, N, C\].*\[4, 3\]"),
    ((S, torch.zeros(2, 4, 5), Y), {}, ValueError, r"teacher_logits\[0\] has shape \[4, 5\]"),
    ((S, [S, torch.zeros(5, 3)], Y), {}, ValueError, r"teacher_logits\[1\] has shape \[5, 3\]"),
    ((S, [], Y), {}, ValueError, "at least one teacher"),
    ((S, "teachers", Y), {}, TypeError, "teacher_logits .* got str"),
    ((S, [S, 3], Y), {}, TypeError, r"teacher_logits\[1\] .* got int"),
    ((S.long(), T, Y), {}, TypeError, "student_logits must be floating, got torch.int64"),
    ((S, [S.int()], Y), {}, TypeError, r"teacher_logits\[0\] must be floating .* torch.int32"),
    ((S[:, :1], T[..., :1], Y), {}, ValueError, "at least 2 classes, got C = 1"),
    ((S, T, Y[:3]), {}, ValueError, r"labels must have shape \[4\], got \[3\]"),
    ((S, T, Y.int()), {}, TypeError, "labels must be int64, got torch.int32"),
    ((S, T, torch.tensor([0, 1, 3, 0])), {}, ValueError, r"labels\[2\] = 3 .* 0 to 2"),
    ((S, T, torch.tensor([0, -2, 2, 0])), {}, ValueError, r"labels\[1\] = -2 .*-100 \(ignore_index\)"),
    ((S, T, Y), {"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
    ((S, T, Y), {"temperature": NAN}, ValueError, "temperature .* got nan"),
    (
        (S, T, Y),
        {"weight_temperature": -1.0},
        ValueError,
        r"weight_temperature must be in \[0, inf\], got -1.0",
    ),
    ((S, T, Y), {"weighting": "margin"}, ValueError, "weighting must be one of .* got 'margin'"),
    ((S, T, Y), {"reduction": "batchmean"}, ValueError, "reduction must be one of .* got 'batchmean'"),
    ((S, T, Y), {"kd_weight": -1.0}, ValueError, "kd_weight .* got -1.0"),
    ((S, T, Y), {"ce_weight": NAN}, ValueError, "ce_weight .* got nan"),
    ((S, T, Y), {"kd_weight": 0.0}, ValueError, "must not both be 0"),
    ((S, T, Y), {"label_smoothing": 1.0}, ValueError, r"label_smoothing must be in \[0, 1\), got 1.0"),
    ((S, T, Y), {"ignore_index": 1}, ValueError, "ignore_index must lie outside the classes 0 to 2, got 1"),
    ((S, T, Y), {"unlabeled_index": 0}, ValueError, "unlabeled_index must lie outside"),
    ((S, T, Y), {"unlabeled_index": -100}, ValueError, "must differ, both are -100"),
    ((S, T, Y), {"num_items": 0}, ValueError, r"num_items must be positive and finite, in \[1e-30, 1e30\], got 0"),
    ((S, T, Y), {"num_items": torch.tensor(-3)}, ValueError, "num_items must be positive .* got -3"),
    ((S, T, Y), {"num_items": 4, "reduction": "sum"}, ValueError, 'num_items .* reduction="mean"'),
    ((S, T, Y), {"num_items": torch.ones(2)}, ValueError, r"num_items .* \[2\]"),
    (
        (S, T, Y),
        {"teacher_prior": torch.ones(3)},
        ValueError,
        r"teacher_prior must have shape \[2\] or \[2, 4\]",
    ),
    ((S, T, Y), {"teacher_prior": torch.tensor([1.0, -1.0])}, ValueError, "teacher_prior .* found -1.0"),
    ((S, T, Y), {"teacher_prior": torch.tensor([1, 1])}, TypeError, "teacher_prior must be floating"),
    ((S, T, Y), {"sample_weight": torch.tensor([1.0, NAN, 1, 1])}, ValueError, "sample_weight .* found nan"),
    ((S, T, Y), {"sample_weight": torch.ones(4, 1)}, ValueError, r"sample_weight must have shape \[4\]"),
    (
        (S, T, Y),
        {"teacher_mask": torch.ones(2, 4)},
        TypeError,
        "teacher_mask must be bool, got torch.float32",
    ),
    (
        (S, T, Y),
        {"teacher_mask": torch.ones(4, 2, dtype=torch.bool)},
        ValueError,
        r"teacher_mask .* \[2, 4\]",
    ),
    ((S, T.to("meta"), Y), {}, RuntimeError, r"teacher_logits\[0\] is on meta, student_logits on cpu"),
    ((S, T, Y.to("meta")), {}, RuntimeError, "labels is on meta, student_logits on cpu"),
    ((S, T, Y), {"backend": "cuda"}, ValueError, "backend must be one of .* got 'cuda'"),
]


@pytest.mark.parametrize(("args", "options", "error", "message"), WRONG, ids=[w[3][:40] for w in WRONG])
def test_wrong_input(
    backend: str, args: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    if torch.get_default_device().type != "cpu":
        pytest.skip("checked on CPU tensors: values on a device are looked at with AMTSS_DEBUG=1 only")
    with pytest.raises(error, match=message):
        amtss_loss(*args, **{"backend": backend} | options)
