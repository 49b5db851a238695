"""The Triton kernels: no access out of bounds, every output written, few compilations, no spilled registers.

test_loss.py tests their results, on a GPU or in Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics import Case, assert_within_budget, make_case

from amtss_fast import TopKLogprobs, amtss_loss
from amtss_fast.loss import LossOptions, ops, registry

pytest.importorskip("triton", reason="the Triton kernels need the package triton")
if registry.why_missing("triton") is not None:
    pytest.skip("the Triton kernels need a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from amtss_fast.loss.backends import triton as _triton
from amtss_fast.loss.backends.triton import binary, launch, plan, scale, sums
from amtss_fast.loss.backends.triton.teachers import SLOTS, numbers, places, teacher_arguments
from amtss_fast.loss.contract import LossInputs
from amtss_fast.loss.options import DIVERGENCES

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# One of each regime: tiles of several rows (a full and an incomplete one), a row per tile, chunks of a row; rows that
# begin anywhere in a group.
SHAPES = [(64, 3, 2), (67, 5, 3), (9, 65, 2), (5, 301, 3), (3, 8201, 2)]


# FENCE is exact in every type of logits. NO_LABEL is a label that no kernel may read, and an offset outside all memory.
FENCE, NO_LABEL = 12288.0, 2**60


class Fence:
    """Copies `inner` into the middle of a buffer that holds `value` on both sides."""

    def __init__(self, inner: torch.Tensor, value: float):
        self.margin = 4096 // inner.element_size()
        self.buffer = torch.full((inner.numel() + 2 * self.margin,), value, dtype=inner.dtype, device=inner.device)
        self.inner = self.buffer[self.margin : self.margin + inner.numel()].view(inner.shape).copy_(inner)
        self.before = self.buffer.clone()

    def assert_stands(self, whole: bool) -> None:
        """Nothing was written outside; with `whole`, nor inside."""
        margin = len(self.buffer) if whole else self.margin
        for side in (slice(margin), slice(-margin, None)):
            got, want = self.buffer[side], self.before[side]
            assert torch.equal(got.isnan(), want.isnan()), "written out of bounds"
            assert torch.equal(got.nan_to_num(), want.nan_to_num()), "written out of bounds"


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Fence]]:
    """Fills every tensor that the launcher allocates with NaN or NO_LABEL, between fences that must stay unchanged."""
    fences: list[Fence] = []
    empty = torch.Tensor.new_empty

    def new_empty(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        plain = empty(self, *args, **kwargs)
        # Triton's interpreter makes empty tensors of its own.
        if plain.numel() == 0:
            return plain
        floating = plain.is_floating_point()
        fences.append(Fence(plain.fill_(float("nan") if floating else NO_LABEL), FENCE if floating else NO_LABEL))
        return fences[-1].inner

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield fences
    monkeypatch.undo()
    for fence in fences:
        fence.assert_stands(whole=False)


@pytest.mark.parametrize(("n", "c", "k"), [*SHAPES, (9, 65, 18)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stays_within_its_buffers(outputs: list[Fence], n: int, c: int, k: int, dtype: torch.dtype) -> None:
    case = make_case(n, c, k, dtype=dtype, masked=True, weighted=True, ce_weight=0.5, label_smoothing=0.1)
    assert_fenced(outputs, case)


@pytest.mark.parametrize(("n", "c"), [(13, 3), (5, 304), (2, 8201)])
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_routed_teachers_stay_within_their_buffers(outputs: list[Fence], n: int, c: int, divergence: str) -> None:
    case = make_case(n, c, 3, ce_weight=0.5, divergence=divergence, teacher_temperature=[1.0, 2.0, 3.0])
    rows = [torch.arange(1, n, 2), None, torch.arange(0, 1)]
    case.teachers = [t if own is None else t[own] for t, own in zip(case.teachers, rows, strict=True)]
    case.options["teacher_rows"] = rows
    assert_fenced(outputs, case)


@pytest.mark.parametrize(("n", "c"), [(4, 9), (2, 1201)])
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd", "tvd"])
def test_lists_stay_within_their_buffers(outputs: list[Fence], n: int, c: int, divergence: str) -> None:
    case = make_case(n, c, 3, temperature=1.0, ce_weight=0.5, divergence=divergence)
    rows = [torch.arange(1, n, 2), None, None]
    for k, tail in enumerate(["bucket", "renormalize"]):
        values, indices = case.teachers[k].log_softmax(-1).topk(5 + 3 * k, dim=-1)
        values[0, 1] = -torch.inf
        if tail == "bucket":
            # The rest is all there is.
            values[1] = -torch.inf
        own = slice(None) if rows[k] is None else rows[k]
        case.teachers[k] = TopKLogprobs(indices[own], values[own], tail)
    case.options["teacher_rows"] = rows
    assert_fenced(outputs, case)


def assert_fenced(outputs: list[Fence], case: Case) -> None:
    inputs = []

    def fence(t: Any) -> Any:
        if isinstance(t, list):
            return [fence(one) for one in t]
        if isinstance(t, TopKLogprobs):
            return TopKLogprobs(*map(fence, t))
        if not torch.is_tensor(t):
            return t
        # NaN around an input makes reads outside of it visible.
        inputs.append(Fence(t, float("nan") if t.is_floating_point() else t.dtype == torch.bool or NO_LABEL))
        return inputs[-1].inner

    options = {name: fence(o) for name, o in case.options.items()}
    result = Case(fence(case.student), [fence(t) for t in case.teachers], fence(case.labels), options).run("triton")
    for name, got in result.parts().items():
        assert got.isfinite().all(), f"{name} was not written, or was computed from what lies around the inputs"
    assert_within_budget(result, case)
    assert len(outputs) >= 6
    for one in inputs:
        one.assert_stands(whole=True)


@pytest.mark.parametrize(("n", "c", "k"), SHAPES)
@pytest.mark.parametrize("weighting", ["label_margin", "label_nll"])
def test_impossible_labels_make_their_rows_nan(
    monkeypatch: pytest.MonkeyPatch, weighting: str, n: int, c: int, k: int
) -> None:
    # As on a GPU without AMTSS_DEBUG, where reading labels would wait for the device.
    monkeypatch.setattr(ops, "values_are_free", lambda tensor: False)
    case = make_case(n, c, k, special_rows=False, ce_weight=0.5, weighting=weighting, reduction="none")
    clean = case.run("triton")
    bad = torch.tensor([0, n - 1], device=case.labels.device)
    case.labels[bad] = torch.tensor([c, 2**62], device=case.labels.device)
    dirty = case.run("triton")
    others = torch.ones(n, dtype=torch.bool, device=case.labels.device)
    others[bad] = False
    assert dirty.loss[bad].isnan().all()
    assert dirty.grad[bad].isnan().all()
    assert torch.equal(dirty.loss[others], clean.loss[others])
    assert torch.equal(dirty.grad[others], clean.grad[others])


@pytest.mark.parametrize(("n", "c"), [(11, 3), (11, 40), (7, 301), (3, 8201)])
def test_codes_are_read_as_they_are(n: int, c: int) -> None:
    """8-bit teachers beside others, against the same logits in float32."""
    case = make_case(n, c, 3, masked=True, ce_weight=0.5)
    codes = torch.randint(0, 256, (n, c), dtype=torch.uint8)
    row_max, step = torch.randn(n), torch.rand(n) / 10
    logits = (row_max.unsqueeze(-1) - step.unsqueeze(-1) * codes).where(codes != 255, float("-inf"))
    absent = {"teacher_rows": [], "teacher_indices": [], "teacher_bucket": []}
    absent |= dict.fromkeys(("teacher_prior", "sample_weight", "num_items"))
    rest = {"labels": case.labels, "teacher_mask": case.options["teacher_mask"], **absent}
    options = LossOptions(ce_weight=0.5, label_smoothing=0.1)
    for teachers in ([codes] * 3, [case.teachers[0], codes, case.teachers[2].bfloat16()]):
        quantized = [t.dtype == torch.uint8 for t in teachers]
        scales = [[s if q else None for q in quantized] for s in (row_max, step)]
        plain = [logits if q else t.float() for q, t in zip(quantized, teachers, strict=True)]
        got, want = (
            _triton.amtss_loss(LossInputs(case.student, *given, **rest), options, need_grad=True, need_stats=True)
            for given in ((teachers, *scales), (plain, [], []))
        )
        for a, b in zip((got.loss, got.grad, *got.stats), (want.loss, want.grad, *want.stats), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("c", [3, 301])
@pytest.mark.parametrize("k", [12, 19])
@pytest.mark.parametrize("stacked", [True, False])
def test_many_teachers(monkeypatch: pytest.MonkeyPatch, stacked: bool, k: int, c: int) -> None:
    """Sixteen teachers are arguments; where the others lie follows from a stride, or is in a table."""
    case = make_case(10, c, k, masked=True, ce_weight=0.3)
    memory = torch.stack(case.teachers)
    case.teachers = [memory[j] for j in (range(k) if stacked else [0, *range(k - 1, 0, -1)])]
    arguments, launches = teacher_arguments(case.teachers)
    assert len(launches) == (k if k > SLOTS and not stacked else 0)
    assert (arguments["t15"] is None) == (k <= SLOTS // 2)

    # The first argument stands for all of the memory that is reached through it.
    monkeypatch.setattr(launch, "teacher_arguments", lambda teachers: (arguments | {"t0": memory}, launches))
    assert_within_budget(case.run("triton"), case)


def test_tables_are_written_on_the_device() -> None:
    launches: list[binary.Launch] = []
    values = [0.5 + j for j in range(19)]
    written = numbers(values, torch.empty(0), launches)
    # Values that no check has seen: 9 and -3 are no rows.
    rows = [torch.tensor([1, 4]), None, torch.tensor([0, 9, -3]), torch.tensor([], dtype=torch.int64)]
    found = places(rows, 5, torch.empty(0), launches)
    assert found is not None
    binary.launch_all(launches)
    assert written.tolist() == values
    assert found.tolist() == [[-1, 0, -1, -1, 1], [0, 1, 2, 3, 4], [0, -1, -1, -1, -1], [-1] * 5]
    assert places([None, None], 5, torch.empty(0), launches) is None


@pytest.mark.parametrize(("n", "c", "k"), [(9, 3, 2), (2, 301, 18)])
def test_autotuning_is_opt_in(monkeypatch: pytest.MonkeyPatch, n: int, c: int, k: int) -> None:
    tried: list[Any] = []

    def bench(run: Any, quantiles: Any) -> list[float]:
        tried.append(run())
        return [1.0] * len(quantiles)

    autotune = binary.triton.autotune
    monkeypatch.setattr(binary.triton, "autotune", lambda configs, key: autotune(configs, key, do_bench=bench))
    binary._tunable.cache_clear()
    case = make_case(n, c, k, ce_weight=0.5)
    plain = case.run("triton")
    assert not tried
    monkeypatch.setenv("AMTSS_AUTOTUNE", "1")
    tuned = case.run("triton")
    assert len(tried) >= 5
    for a, b in zip(plain.parts().values(), tuned.parts().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    binary._tunable.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, 0.37])
def test_the_gradient_is_scaled_in_place(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, factor: float) -> None:
    # Four programs for five blocks.
    monkeypatch.setattr(scale, "multiprocessors", lambda device: 1)
    grad = torch.randn(5, 4001).to(dtype)
    expected = grad * factor
    same = grad.clone()
    assert _triton.scale_gradient(same, torch.tensor(factor), same) is same
    # Triton's interpreter cuts bfloat16 off where a GPU rounds.
    torch.testing.assert_close(same, expected, rtol=0 if factor == 1.0 else torch.finfo(dtype).eps, atol=0)
    other = torch.full_like(grad, float("nan"), dtype=torch.float16)
    _triton.scale_gradient(grad, torch.tensor(factor), other)
    torch.testing.assert_close(other.float(), (grad.float() * factor).half().float())


@pytest.mark.parametrize("n", [0, 1, 500, 513, 65_536, 65_537, 200_003])
def test_sums_over_the_rows(n: int) -> None:
    torch.manual_seed(0)
    labels, rows = torch.randint(-1, 3, (n,)), torch.rand(n)
    for ignored in (-1, -100):
        launches: list[binary.Launch] = []
        loss = sums.add(rows, sums.count(labels, ignored, launches), ignored, launches)
        binary.launch_all(launches)
        torch.testing.assert_close(loss.double(), rows.double().sum() / max(1, int((labels != ignored).sum())))
    launches = []
    loss = sums.add(rows, None, -100, launches)
    binary.launch_all(launches)
    torch.testing.assert_close(loss.double(), rows.double().sum())


def divide_all_rows(monkeypatch: pytest.MonkeyPatch, lag: int | None = None) -> None:
    """Short rows are divided into chunks, too; `lag`: of the steps of one read."""
    monkeypatch.setattr(plan, "choose_config", lambda *_: None)
    if lag is not None:
        monkeypatch.setattr(plan, "choose_lag", lambda *_: lag)
    # What was planned before stays out of the way, and what is planned now, afterwards.
    monkeypatch.setattr(launch, "make_plan", plan.make_plan.__wrapped__)


@pytest.mark.parametrize(
    ("c", "chunks", "temperature"), [(65, False, 1.0), (301, False, 0.1), (301, False, 3.0), (1201, True, 1.0)]
)
def test_logits_of_any_size(monkeypatch: pytest.MonkeyPatch, c: int, chunks: bool, temperature: float) -> None:
    """Shifted by much, or masked by the lowest number instead of -inf, also a whole row or chunk."""
    if chunks:
        divide_all_rows(monkeypatch)
    lowest = torch.finfo(torch.float32).min
    student, first, second = torch.randn(3, 6, c)
    student[0] = first[0] = second[0, : c - 1] = lowest
    student[1], first[1] = -1e9, 1e10
    student[2] += 1e4
    first[2] -= 1e4
    student[3] += 1e9
    first[3, 9:] = lowest
    second[4, : c // 3] = lowest
    second[5] = 3e38
    labels = torch.randint(c, (6,))
    found = []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "triton")):
        x = student.to(dtype).requires_grad_()
        teachers = [t.to(dtype) for t in (first, second)]
        loss = amtss_loss(
            x, teachers, labels, temperature=temperature, ce_weight=0.5, reduction="none", backend=backend
        )
        loss.sum().backward()
        assert x.grad is not None
        found.append((loss.detach().double(), x.grad.double()))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-7)


def test_reading_once_and_twice_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the distance between the statistics of a row and its gradient."""
    case = make_case(5, 1100, 2, masked=True, ce_weight=0.5, divergence="jsd")
    launched: list[binary.Launch] = []

    def launch_all(launches: list[binary.Launch]) -> None:
        launched.extend(launches)
        binary.launch_all(launches)

    outcomes = []
    for lag, most, twice in ((1, 2**31, ""), (3, 2**31, ""), (1, 10, ""), (1, 2**31, "1")):
        divide_all_rows(monkeypatch, lag)
        monkeypatch.setattr(launch, "launch_all", launch_all)
        monkeypatch.setattr(launch, "MOST_TICKETS", most)
        monkeypatch.setenv("AMTSS_TWO_READS", twice)
        launched.clear()
        outcomes.append(case.run("triton").parts())
        steps = [x.arguments["STEP"] for x in launched if "STEP" in x.arguments]
        assert (steps == ["all"]) == (most > 10 and not twice), steps
    assert_within_budget(case.run("triton"), case)
    for outcome in outcomes:
        for part, value in outcome.items():
            assert torch.equal(value.nan_to_num(), outcomes[0][part].nan_to_num()), part


@pytest.mark.parametrize("c", [3, 301, 8201])
def test_divisor_of_many_rows(monkeypatch: pytest.MonkeyPatch, c: int) -> None:
    """Rows are counted by a kernel of its own."""
    monkeypatch.setattr(sums, "FEW_ROWS", 0)
    monkeypatch.setattr(sums, "ONE_PROGRAM", 0)
    case = make_case(7, c, 2, ce_weight=0.5)
    assert_within_budget(case.run("triton"), case)


def test_float64_is_refused() -> None:
    case = make_case(4, 3, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"'triton' cannot run .* student_logits is torch.float64"):
        amtss_loss(case.student, case.teachers, case.labels, backend="triton")


@pytest.mark.parametrize("c", [3, 8201])
def test_without_distillation_no_teacher_is_read(outputs: list[Fence], c: int) -> None:
    case = make_case(3, c, 2, kd_weight=0.0, ce_weight=1.0, divergence="jsd")
    got, want = (
        amtss_loss(case.student.requires_grad_(), case.teachers, case.labels, backend=backend, **case.options)
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(got, want)
    assert len(outputs) >= 3


def test_long_lists_are_refused() -> None:
    top = TopKLogprobs(torch.arange(4096)[None], torch.full((1, 4096), -9.0))
    with pytest.raises(RuntimeError, match=r"teacher_logits\[1\] lists 4096 classes of a row, allowed are 4095"):
        amtss_loss(torch.randn(1, 5000), [torch.randn(1, 5000), top], temperature=1.0, backend="triton")


# Tests of compilations run in a process of their own, because the interpreter replaces the compiler.


def run_compiling(script: str) -> str:
    """What `script` prints in a process where the kernels are compilable."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "benchmarks")
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=600, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_decides_a_compilation() -> None:
    """Other N, C within a tile, strides, addresses and numbers of teachers: the same binary to Triton.

    And never two of Triton's binaries where this library launches the one that it remembers.
    """
    script = """
import collections, itertools, torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from amtss_fast.loss.backends.triton import launch, plan
from amtss_fast.loss import LossOptions
from amtss_fast.loss.backends.triton.config import choose_layout
from gpu_static import loss_inputs

backend = make_backend(GPUTarget("cuda", 90, 32))
seen = collections.defaultdict(set)

def key(launched):
    kernel = launched.binary.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    _, specialization, options = bind(*launched.values, **launched.binary.options(GPUTarget("cuda", 90, 32)))
    key = kernel.fn.__name__, str(specialization), str(options)
    seen[launched.binary].add(key)
    return key

def tensor(n, c, dtype=torch.float32, offset=0, row=0):
    return torch.empty(offset + n * (c + row) + 64, dtype=dtype)[offset:].as_strided((n, c), (c + row, 1))

def planned(student, teachers, labels=True, prior=None, mask=None, weight=None, items=None, beta=1.0, ce=0.5,
         weighting="label_margin", reduction="mean", grad=True, stats=False, divergence="forward_kl", mix=None,
         temperature=None, rows=False, listed=0):
    labels = torch.zeros(len(student), dtype=torch.int64) if labels else None
    scale = [torch.empty(len(student)) if t.dtype == torch.uint8 else None for t in teachers]
    inputs = loss_inputs(student, teachers, scale, scale, labels=labels, teacher_prior=prior, teacher_mask=mask,
                         sample_weight=weight, num_items=items,
                         teacher_rows=[torch.arange(len(student))] * len(teachers) if rows else [])
    if listed:
        entries = torch.zeros(len(student), listed)
        inputs = inputs._replace(teacher_logits=[entries, *teachers], teacher_row_max=[], teacher_step=[],
                                 teacher_indices=[entries.long(), *[None] * len(teachers)],
                                 teacher_bucket=[False] * (1 + len(teachers)))
    options = LossOptions(weighting=weighting, weight_temperature=beta, ce_weight=ce, label_smoothing=0.1,
                          reduction=reduction, divergence=divergence, divergence_beta=mix,
                          teacher_temperature=temperature)
    return launch.prepare(inputs, options, need_grad=grad, need_stats=stats)

def keys(cases):
    all_launches = [p for n, c, k in cases for p in planned(tensor(n, c), [tensor(n, c) for _ in range(k)])[0]]
    found = {key(p) for p in all_launches}
    return len(found), len({name for name, *_ in found})

plan.make_plan.cache_clear()
print(*keys([(n, 3, k) for n in (1, 7, 16, 64, 500) for k in (5, 6, 7, 8)]))
print(plan.make_plan.cache_info().currsize)
print(*keys([(n, c, 3) for n in (1, 2, 16, 33) for c in (1600, 1616, 1999, 2001)]))
print(*keys([(n, c, 4) for n in (1, 2, 16) for c in (32000, 32008, 50002)]))

def check(c, student, teachers, **options):
    launches, (_, grad, _) = planned(student, teachers, **options)
    logits = [student, *teachers, *([] if grad is None else [grad])]
    layout = choose_layout(c, logits, options.get("rows", False), options.get("divergence", "forward_kl"))
    for launched in launches:
        key(launched)
        assert launched.arguments.get("GROUP", layout.group) == layout.group

f32, bf16, f16, u8 = torch.float32, torch.bfloat16, torch.float16, torch.uint8
for c, n, offset, row in itertools.product((3, 40, 301, 9000), (1, 32, 600, 70_000), (0, 1, 4, 8), (0, 1)):
    if n * c > 300_000:
        continue
    for s, *ts in ((f32, f32), (bf16, bf16, bf16), (f32, f16, f32, u8), (f16, u8, u8)):
        student, *teachers = (tensor(n, c, dtype, offset, row) for dtype in (s, *ts))
        weight, prior, items = torch.empty(n), torch.empty(len(ts)), torch.tensor(3.0)
        for options in (
            {}, {"labels": False}, {"ce": 0.0}, {"beta": 0.0}, {"beta": float("inf")}, {"weighting": "label_nll"},
            {"grad": False}, {"stats": True}, {"reduction": "sum"}, {"reduction": "none"},
            {"prior": prior}, {"prior": prior.double()}, {"mask": torch.empty(len(ts), n) > 0},
            {"weight": weight}, {"weight": weight.double()}, {"items": items}, {"items": items.double()},
            {"divergence": "reverse_kl"}, {"divergence": "jsd"}, {"divergence": "jsd", "mix": 0.1, "stats": True},
            {"temperature": 1.0}, {"rows": True}, {"rows": True, "divergence": "tvd", "temperature": 1.0},
        ):
            check(c, student, teachers, **options)
        check(c, student, [*teachers * 10, tensor(n, c, s, 0, 5)])
for c, n, length, stats in itertools.product((3, 301, 9000), (1, 32), (2, 3, 40), (False, True)):
    for teachers in ([], [tensor(n, c)], [tensor(n, c, bf16)]):
        for p in planned(tensor(n, c), teachers, listed=length, stats=stats, divergence="jsd")[0]:
            key(p)
assert len(seen) > 300 and {len(found) for found in seen.values()} == {1}, len(seen)
"""
    tiles, plans, rows, chunks = run_compiling(script).splitlines()
    # Of each kernel one: of the loss and of its sum.
    assert tiles == rows == "2 2"
    # A plan for each number of teachers.
    assert plans == "4"
    # Three kernels of the loss. One is compiled for the number of chunks of a row, rounded up to a power of two.
    assert int(chunks.split()[0]) <= 5


def assert_lean(s: dict[str, Any]) -> None:
    """No spills, everything fits; of contiguous rows 16-byte loads, and each logit once per kernel."""
    where = f"{s['kernel']} {s['config']}, {s['call']}, {s['divergence']}, on {s['target']}"
    assert s["source"] == "predicted", where
    assert s["spill_bytes"] == 0, where
    assert s["fits_shared"], where
    assert s["registers"] > 0, where
    if s["kernel"].startswith("join") or s["call"] in ("strided", "mixed"):
        return
    student, teacher = (getattr(torch, name).itemsize for name in s["config"].split()[0].split("/"))
    # With two classes the compiler for gfx942 makes several versions of the loop over teachers, of which one runs.
    if not ("64 x 2," in s["config"] and s["target"] == "gfx942"):
        assert s["read_bytes_per_logit"] == (student + teacher) / 2, where
    writes = s["kernel"] in ("tile", "one read", "gradient")
    assert s["written_bytes_per_logit"] == (student if writes else 0), where
    if s["kernel"] != "tile" or " 1 x " in s["config"]:
        # Of 256 narrow classes a thread of a warp has less.
        classes, threads = (int(x) for x in re.findall(r"(\d+), (\d+) threads", s["config"])[0])
        share = 8 * teacher * classes // max(threads, 64 if s["target"] == "gfx942" else 32)
        assert s["load_bits"] == min(128, share), where


def stored(name: str) -> list[dict[str, Any]]:
    return json.loads((ROOT / "benchmarks" / "results" / name).read_text())


def test_static_bars() -> None:
    """Of every kernel, configuration and chip."""
    rows = stored("gpu_static.json")
    for row in rows:
        assert_lean(row)
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942"}
    assert len({(row["kernel"], row["config"], row["call"], row["divergence"]) for row in rows}) > 120
    assert {row["divergence"] for row in rows} == {*DIVERGENCES}
    assert all(time["source"] == "predicted" and time["milliseconds"] > 0 for time in stored("gpu_times.json"))


def test_static_figures_are_of_these_kernels() -> None:
    """Those that come closest to a bar, compiled anew."""
    script = """
import gpu_static, json, torch, triton
f32, bf16, u8 = torch.float32, torch.bfloat16, torch.uint8
cases = [(5000, bf16, bf16, "all", "sm_120"), (5000, f32, f32, "all", "sm_120"), (256, f32, f32, "all", "sm_100"),
         (100, f32, f32, "mixed", "sm_90"), (1024, f32, f32, "strided", "sm_100"), (1024, f32, u8, "all", "sm_80"),
         (250_002, f32, f32, "mixed", "sm_100"),
         (250_002, bf16, bf16, "labels", "sm_90"), (250_002, f32, f32, "two reads", "sm_90"),
         (3, f32, f32, "all", "gfx942")]
others = [(32, "skew_reverse_kl", "sm_80"), (1024, "jsd", "sm_90"), (250_002, "skew_reverse_kl", "sm_90")]
cases = [(*case, "forward_kl") for case in cases]
cases += [(c, f32, f32, "all", target, divergence) for c, divergence, target in others]
cases += [(250_002, f32, f32, "lists", "sm_90", "jsd")]
rows = [gpu_static.examine(p, target, call)._asdict() for c, s, t, call, target, divergence in cases
        for p in gpu_static.launches(c, s, t, call, divergence)]
print(json.dumps([row | {"triton": triton.__version__, "source": "predicted"} for row in rows]))
"""
    rows = stored("gpu_static.json")
    anew = json.loads(run_compiling(script))
    if anew[0]["triton"] != rows[0]["triton"]:
        pytest.skip(f"the figures are of Triton {rows[0]['triton']}, this is {anew[0]['triton']}")
    for row in anew:
        assert_lean(row)
        assert row in rows, f"run benchmarks/gpu_static.py again: {row}"


def test_static_table_as_json(tmp_path: Path) -> None:
    table, times = tmp_path / "static.json", tmp_path / "times.json"
    script = f"""
import sys, gpu_static
gpu_static.TYPES, gpu_static.CLASSES, gpu_static.CALLS = gpu_static.TYPES[:1], [3, 250_002], ["all"]
gpu_static.OTHER_DIVERGENCES, gpu_static.CLASSES_OF_LISTS = (), 9000
sys.argv = ["gpu_static.py", "--targets", "sm_80", "--json", {str(table)!r}, "--times", {str(times)!r}]
gpu_static.main()
"""
    printed = run_compiling(script)
    assert "predicted milliseconds" in printed
    rows = json.loads(table.read_text())
    assert {row["kernel"] for row in rows} == {"tile", "one read"}
    for row in rows:
        assert_lean(row)
    assert json.loads(times.read_text())[0]["chip"] == "A100 80 GB"


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
@pytest.mark.parametrize(("n", "c", "k"), [*SHAPES, (9, 65, 18)])
@pytest.mark.parametrize("how", ["dense", "routed", "listed"])
def test_in_a_cuda_graph_without_synchronisation(n: int, c: int, k: int, how: str) -> None:
    case = make_case(n, c, k, masked=True, ce_weight=0.5)
    if how == "listed":
        values, indices = case.teachers[0].log_softmax(-1).topk(2, dim=-1)
        case.teachers[0] = TopKLogprobs(indices, values, "renormalize")
    if how == "routed":
        case.options |= {"divergence": "jsd", "teacher_temperature": 1.0, "teacher_rows": [torch.arange(n - 1)] * k}
        case.teachers = [t[: n - 1] for t in case.teachers]
    student = case.student.requires_grad_()

    def step() -> torch.Tensor:
        student.grad = None
        loss = amtss_loss(student, case.teachers, case.labels, backend="triton", **case.options)
        loss.backward()
        return loss.detach()

    expected, expected_grad = step(), student.grad
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            loss = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(loss, expected)
    assert torch.equal(student.grad, expected_grad)
