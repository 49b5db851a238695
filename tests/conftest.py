"""The backends that this machine has; tests that take `backend` run on each of them."""

from __future__ import annotations

import os

import pytest
import torch

from amtss_fast.loss import registry


def pytest_configure(config: pytest.Config) -> None:
    # Before anything imports Triton.
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def available_backends() -> list[str]:
    return [name for name in registry.BACKENDS if registry.why_missing(name) is None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
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
