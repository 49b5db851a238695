"""The backends that this machine has, for tests that take `backend`, and the profiles of random tests."""

from __future__ import annotations

import os
import signal
from typing import Any

import fuzz
import pytest
import torch
from backends import available_backends
from hypothesis import HealthCheck, settings

# `make test` tries the same few examples each time, `make fuzz` many new ones.
_RANDOM = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("default", max_examples=40, derandomize=True, **_RANDOM)
settings.register_profile(
    "fuzz", max_examples=int(os.environ.get("AMTSS_FUZZ_EXAMPLES", "20000")), print_blob=True, **_RANDOM
)
settings.load_profile("default")


def pytest_configure(config: pytest.Config) -> None:
    # A shell that starts this in the background has it ignore Ctrl-C, which commands and their tests send.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Before anything imports Triton.
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    given = [marker.args[0] for marker in metafunc.definition.iter_markers("parametrize")]
    # A test may choose its own.
    chosen = any("backend" in ([names] if isinstance(names, str) else names) for names in given)
    if "backend" in metafunc.fixturenames and not chosen:
        metafunc.parametrize("backend", available_backends())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`pytest -m gpu` is what only a GPU can show."""
    if not torch.cuda.is_available():
        return
    for item in items:
        backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
        if backend == "triton" or item.path.name == "test_triton.py":
            item.add_marker("gpu")


@pytest.fixture(autouse=True)
def _device_of_the_backend(request: pytest.FixtureRequest) -> object:
    """On a machine with a GPU, tests of the Triton kernels make their tensors there."""
    wanted = "backend" in request.fixturenames and request.getfixturevalue("backend") == "triton"
    if not (torch.cuda.is_available() and (wanted or request.node.path.name == "test_triton.py")):
        return (yield)
    torch.set_default_device("cuda")
    try:
        return (yield)
    finally:
        torch.set_default_device(None)


def pytest_sessionfinish(session: pytest.Session) -> None:
    # A process of pytest-xdist hands its counts over.
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["fuzz"] = [(*key, number) for key, number in fuzz.COUNTS.items()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for what, how, number in getattr(node, "workeroutput", {}).get("fuzz", []):
        fuzz.COUNTS[what, how] += number


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if fuzz.COUNTS and config.getoption("--hypothesis-profile") == "fuzz":
        terminalreporter.section("examples and outcomes")
        for line in fuzz.table():
            terminalreporter.write_line(line)
