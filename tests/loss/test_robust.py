"""What happens around the loss: no memory, many threads at once, a fork."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics import Case, make_case
from test_linear import LinearCase, make_linear_case

from amtss_fast.loss import registry

if (reason := registry.why_missing("cpu")) is not None:
    pytest.skip(reason, allow_module_level=True)


def bits(case: Case | LinearCase) -> dict[str, torch.Tensor]:
    """Loss, gradients and stats."""
    return case.run("cpu").parts() if isinstance(case, Case) else case.run("cpu")


def assert_same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


CASES: list[Any] = [
    make_case(60, 300, 3, ce_weight=0.5),
    make_case(40, 700, 2, dtype=torch.bfloat16, weighting="label_nll"),
    make_case(9, 3, 4, masked=True),
    make_linear_case(40, 200, ce_weight=0.3),
    make_linear_case(20, 50, dtype=torch.bfloat16, reduction="none", extras=True),
]


@pytest.fixture
def two_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_64_callers_at_once() -> None:
    alone = [bits(case) for case in CASES]
    with ThreadPoolExecutor(64) as pool:
        for i, got in enumerate(pool.map(lambda i: bits(CASES[i % len(CASES)]), range(192))):
            assert_same(got, alone[i % len(CASES)])


# Scratch.

NO_MEMORY = """
import ctypes, resource, sys, threading
import torch
from numerics import make_case
from test_robust import assert_same, bits

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.malloc.argtypes = [ctypes.c_size_t]
torch.set_num_threads(2)
case = make_case(60, 300, 3, ce_weight=0.5)

def call():
    try:
        found.append(bits(case))
    except BaseException as error:
        found.append(error)

def in_a_new_thread():
    # A thread has scratch of its own.
    found.clear()
    begin, thread = threading.Event(), None
    def wait():
        begin.wait()
        call()
    thread = threading.Thread(target=wait)
    thread.start()
    return begin, thread

found = []
begin, thread = in_a_new_thread()
begin.set(); thread.join()
good = found[0]

begin, thread = in_a_new_thread()
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
_, most = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (size, most))
held = []
while address := libc.malloc(600 * 1024):
    held.append(address)
begin.set(); thread.join()
refused = found[0]
for address in held:
    libc.free(address)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
assert type(refused) is MemoryError, repr(refused)
begin, thread = in_a_new_thread()
begin.set(); thread.join()
assert_same(found[0], good)
print("refused, then right")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_scratch_that_cannot_be_allocated_is_a_memory_error() -> None:
    paths = [str(Path(__file__).parent), *sys.path]
    run = subprocess.run(
        [sys.executable, "-c", NO_MEMORY],
        # One arena for all threads: others would have memory in reserve.
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (run.returncode, run.stdout) == (0, "refused, then right\n"), run.stderr


# Fork.


def _in_child(case: Any, queue: Any) -> None:
    queue.put({name: value.double().tolist() for name, value in bits(case).items()})


def _run_in_child(case: Any) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(case, queue))
    child.start()
    try:
        return queue.get(timeout=30)
    finally:
        child.kill()
        child.join()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("two_threads")
def test_a_child_has_the_same_bits(case: Any) -> None:
    if torch.cuda.is_initialized():
        pytest.skip("torch has no gradients in a fork of a process that used CUDA")
    wanted = {name: value.double().tolist() for name, value in bits(case).items()}
    assert repr(_run_in_child(case)) == repr(wanted)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
@pytest.mark.usefixtures("two_threads")
def test_os_fork_after_threads() -> None:
    if torch.cuda.is_initialized():
        pytest.skip("torch has no gradients in a fork of a process that used CUDA")
    case = CASES[0]
    wanted = bits(case)
    child = os.fork()
    if child == 0:
        # A child that hangs is ended by a signal.
        import signal

        signal.alarm(30)
        status = 1
        try:
            assert_same(bits(case), wanted)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
