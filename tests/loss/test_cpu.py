"""The native CPU backend: everything but the formula, which test_loss.py tests."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import Case, Result, assert_within_budget, make_case

from amtss_fast import amtss_loss, quantize_logits
from amtss_fast.loss import registry

if (reason := registry.why_missing("cpu")) is not None:
    pytest.skip(reason, allow_module_level=True)

from amtss_fast import _cpu
from amtss_fast.loss.backends import cpu

WEIGHTINGS = ["label_margin", "top2_margin", "label_nll"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_same_bits(a: Result, b: Result) -> None:
    for name, value in a.parts().items():
        torch.testing.assert_close(value, b.parts()[name], rtol=0, atol=0, equal_nan=True, msg=name)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def check_instruction_set(name: str) -> None:
    """Run in a process of its own: the instruction set is chosen once."""
    assert cpu.instruction_set() == name
    for c in (2, 3, 8, 31, 33, 257, 1030, 5000):
        for i, weighting in enumerate(WEIGHTINGS):
            case = make_case(
                19,
                c,
                3,
                dtype=DTYPES[i],
                teacher_dtypes=DTYPES,
                masked=True,
                weighted=True,
                weighting=weighting,
                ce_weight=0.5,
                label_smoothing=0.1,
                seed=c,
            )
            assert_within_budget(case.run("cpu"), case)


@pytest.mark.parametrize("name", _cpu.instruction_sets())
def test_every_instruction_set_of_the_machine(name: str) -> None:
    run = run_python(f"import test_cpu; test_cpu.check_instruction_set({name!r})", AMTSS_CPU_ISA=name)
    assert run.returncode == 0, run.stderr


def test_an_instruction_set_that_the_machine_lacks_is_an_error() -> None:
    run = run_python(
        "import torch, amtss_fast; amtss_fast.amtss_loss(torch.zeros(2, 3), torch.zeros(1, 2, 3))",
        AMTSS_CPU_ISA="avx1024",
    )
    has = ", ".join(_cpu.instruction_sets())
    assert f"AMTSS_CPU_ISA=avx1024 is not among the instruction sets of this machine: {has}" in run.stderr
    assert run.returncode != 0


def test_without_the_compiled_module() -> None:
    code = """
import sys
sys.modules["amtss_fast._cpu"] = None
import torch, amtss_fast
from amtss_fast.loss import registry
logits = torch.randn(4, 3)
amtss_fast.amtss_loss(logits, [logits])
assert registry.why_missing("cpu") is not None
amtss_fast.amtss_loss(logits, [logits], backend="cpu")
"""
    run = run_python(code)
    assert "RuntimeError: backend 'cpu' is not available: the compiled module amtss_fast._cpu cannot" in run.stderr


@pytest.fixture
def two_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("n", "c", "k"), [(5000, 3, 4), (300, 40, 3), (67, 1000, 3), (9, 70_000, 2)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.usefixtures("two_threads")
def test_same_bits_at_any_number_of_threads(n: int, c: int, k: int, reduction: str) -> None:
    case = make_case(n, c, k, ce_weight=0.3, reduction=reduction)
    two = case.run("cpu")
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert_same_bits(case.run("cpu"), two)


@pytest.mark.usefixtures("two_threads")
def test_several_callers_at_once() -> None:
    cases = [make_case(200, c, 3, seed=c) for c in (3, 100, 2000)]
    alone = [case.run("cpu") for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for i, result in enumerate(pool.map(lambda i: cases[i % 3].run("cpu"), range(60))):
            assert_same_bits(result, alone[i % 3])


def test_the_interpreter_runs_on_during_a_call() -> None:
    student = torch.randn(1000, 1).expand(1000, 100_000)
    done = threading.Event()

    def call() -> None:
        amtss_loss(student, [student], backend="cpu")
        done.set()

    thread = threading.Thread(target=call)
    thread.start()
    turns = 0
    while not done.is_set():
        time.sleep(0.001)
        turns += 1
    thread.join()
    # 200 million exponentials take more than 10 ms on any machine; with the lock held there would be one turn or two.
    assert turns > 5


def _loss_in_child(case: Case, queue: Any) -> None:
    queue.put(float(case.run("cpu").loss))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
@pytest.mark.usefixtures("two_threads")
def test_after_fork() -> None:
    if torch.cuda.is_initialized():
        pytest.skip("torch has no gradients in a fork of a process that used CUDA")
    case = make_case(100, 2000, 3)
    loss = float(case.run("cpu").loss)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_loss_in_child, args=(case, queue))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert queue.get() == loss


@pytest.mark.parametrize("c", [3, 50, 3000])
def test_codes_are_the_logits_that_they_stand_for(c: int) -> None:
    case = make_case(40, c, 3)
    teachers = [t.masked_fill(torch.rand(t.shape) < 0.1, float("-inf")) for t in case.teachers]
    quantized = [quantize_logits(t) for t in teachers]
    wanted = Case(case.student, [q.dequantize() for q in quantized], case.labels).run("cpu")
    assert_same_bits(Case(case.student, list(quantized), case.labels).run("cpu"), wanted)
    # Codes and scales at any stride, beside a teacher in floats.
    spread = [q._replace(codes=torch.stack([q.codes, q.codes], -1)[..., 1]) for q in quantized]
    spread = [q._replace(row_max=q.row_max.repeat_interleave(2)[::2]) for q in spread]
    mixed = [quantized[0].dequantize(), spread[1], spread[2]]
    assert_same_bits(Case(case.student, mixed, case.labels).run("cpu"), wanted)


@pytest.mark.parametrize("c", [7, 2000])
def test_weights_in_double_precision_and_at_any_stride(c: int) -> None:
    case = make_case(30, c, 3, masked=True, weighted=True)
    wanted = case.run("cpu")
    options = {
        "teacher_prior": case.options["teacher_prior"].double().t().contiguous().t(),
        "teacher_mask": case.options["teacher_mask"].t().contiguous().t(),
        "sample_weight": case.options["sample_weight"].double().repeat_interleave(3)[::3],
    }
    assert case.labels is not None
    labels = case.labels.repeat_interleave(2)[::2]
    assert_same_bits(Case(case.student, case.teachers, labels, options).run("cpu"), wanted)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    k = draw(st.integers(1, 5))
    case = make_case(
        # Over few rows plain torch may be exact by chance.
        draw(st.integers(16, 40)),
        draw(st.one_of(st.integers(2, 70), st.sampled_from([500, 1023, 1024, 1025, 2049, 3333]))),
        k,
        dtype=draw(st.sampled_from(DTYPES)),
        teacher_dtypes=draw(st.lists(st.sampled_from(DTYPES), min_size=k, max_size=k)),
        spread=draw(st.sampled_from([0.3, 2.0, 20.0])),
        special_rows=draw(st.booleans()),
        masked=draw(st.booleans()),
        weighted=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
        temperature=draw(st.sampled_from([0.5, 1.0, 2.0, 3.7])),
        weighting=draw(st.sampled_from(WEIGHTINGS)),
        weight_temperature=draw(st.sampled_from([0.1, 1.0, float("inf")])),
        kd_weight=draw(st.sampled_from([0.0, 0.7])),
        ce_weight=draw(st.sampled_from([0.2, 1.0])),
        label_smoothing=draw(st.sampled_from([0.0, 0.1])),
        reduction=draw(st.sampled_from(["mean", "sum", "none"])),
    )
    if draw(st.booleans()):
        case.teachers = [
            t.masked_fill(torch.rand(t.shape, generator=torch.Generator().manual_seed(i)) < 0.2, float("-inf"))
            for i, t in enumerate(case.teachers)
        ]
    return case


@given(cases())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_budget_of_any_case(case: Case) -> None:
    grad_output = torch.linspace(0.5, 2, case.student.shape[0]) if case.options["reduction"] == "none" else None
    assert_within_budget(case.run("cpu", grad_output), case, grad_output)


def available_memory() -> int:
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None
    return int(found[1]) * 1024


def test_more_than_two_billion_logits() -> None:
    n, c = 70_000, 32_768
    if available_memory() < 8e9:
        pytest.skip("the gradient alone takes 4.6 GB")
    # Pages that are not written to are not allocated: only the last rows take memory.
    student, teacher = torch.empty(n, c, dtype=torch.bfloat16), torch.empty(n, c, dtype=torch.bfloat16)
    student[-3:], teacher[-3:] = torch.randn(3, c), torch.randn(3, c)
    labels = torch.full((n,), -100)
    labels[-3:] = torch.tensor([0, c - 1, -1])
    student.requires_grad_()
    loss = amtss_loss(student, [teacher], labels, backend="cpu")
    loss.backward()
    grad = student.grad
    assert grad is not None
    small = student.detach()[-3:].clone().requires_grad_()
    wanted = amtss_loss(small, [teacher[-3:]], labels[-3:], backend="cpu")
    wanted.backward()
    assert small.grad is not None
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(grad[-3:], small.grad)
    assert not grad[:-3:997].any()


def test_memory_of_large_gradients_is_used_again() -> None:
    case = make_case(400, 3000, 2)
    small = make_case(400, 2000, 2)

    def gradient(case: Case) -> torch.Tensor:
        student = case.student.detach().requires_grad_()
        amtss_loss(student, case.teachers, case.labels, backend="cpu").backward()
        assert student.grad is not None
        return student.grad

    first = gradient(case)
    values, place = first.clone(), first.data_ptr()
    second = gradient(case)
    assert second.data_ptr() != place
    torch.testing.assert_close([first, second], [values] * 2, rtol=0, atol=0)
    del first
    third = gradient(case)
    assert third.data_ptr() == place
    torch.testing.assert_close([second, third], [values] * 2, rtol=0, atol=0)
    del third
    assert gradient(small).data_ptr() != place, "too small for the kernel's own memory"
    cpu.release_memory()
    torch.testing.assert_close(gradient(case), values, rtol=0, atol=0)


def check_memory() -> None:
    """Run in a process of its own: the high-water mark is the process's."""
    torch.set_num_threads(2)
    n, c, k = 60, 100_000, 3
    student, teachers = torch.randn(n, c), torch.randn(k, n, c)
    labels = torch.randint(c, (n,))
    # Code and allocator are warm; the workers and their scratch are not.
    small = student[:2, :5].clone().requires_grad_()
    amtss_loss(small, teachers[:, :2, :5], labels[:2] % 5, backend="cpu").backward()

    def status(key: str) -> int:
        found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    student.requires_grad_()
    amtss_loss(student, teachers, labels, backend="cpu").backward()
    beyond = status("VmHWM") - before - n * c * 4
    assert beyond < 2e6, f"{beyond} bytes beyond the gradient"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_beyond_the_gradient() -> None:
    run = run_python("import test_cpu; test_cpu.check_memory()")
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": (3, 5)}, r"labels\[3\] = 5 is not allowed: expected 0 to 4, -100 .* or -1"),
        ({"labels": (0, -2)}, r"labels\[0\] = -2 is not allowed"),
        ({"teacher_prior": (1, -0.5)}, r"teacher_prior must hold finite numbers >= 0, found -0\.5"),
        ({"teacher_prior": (0, float("nan"))}, r"teacher_prior must hold finite numbers >= 0, found nan"),
        ({"sample_weight": (7, float("inf"))}, r"sample_weight must hold finite numbers >= 0, found inf"),
    ],
)
def test_values_that_are_not_allowed(change: dict[str, Any], message: str, reduction: str) -> None:
    tensors = {
        "labels": torch.zeros(8, dtype=torch.int64),
        "teacher_prior": torch.ones(2),
        "sample_weight": torch.ones(8),
    }
    for name, (index, value) in change.items():
        tensors[name][index] = value
    with pytest.raises(ValueError, match=message):
        amtss_loss(torch.zeros(8, 5), torch.zeros(2, 8, 5), **tensors, reduction=reduction, backend="cpu")


def test_what_it_cannot_run_is_refused() -> None:
    double = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"student_logits are torch\.float64; it takes"):
        amtss_loss(double, [double], backend="cpu")
    with pytest.raises(RuntimeError, match=r"teacher_logits\[1\] is torch\.float64"):
        amtss_loss(double.float(), [double.float(), double], backend="cpu")
    with pytest.raises(RuntimeError, match=r"there are 257 teachers; it takes up to 256"):
        amtss_loss(double.float(), [double.float()] * 257, backend="cpu")
    wide = torch.zeros(1, 1).expand(1, 2**31)
    with pytest.raises(RuntimeError, match=r"there are 2147483648 classes; it takes up to 2147483647"):
        amtss_loss(wide, [wide], backend="cpu")
    with pytest.raises(ValueError, match=r"temperature must be in .* got 1e\+31"):
        amtss_loss(double.float(), [double.float()], temperature=1e31, backend="cpu")
    assert amtss_loss(double, [double]).dtype == torch.float64


@pytest.mark.parametrize("num_items", [0.0, -1.0, float("nan"), float("inf")])
def test_num_items_is_positive(num_items: float) -> None:
    logits = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="num_items must be positive"):
        amtss_loss(logits, [logits], num_items=torch.tensor(num_items), backend="cpu")
