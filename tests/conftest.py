"""The backends that this machine has; tests that take `backend` run on each of them."""

from __future__ import annotations

import collections
import importlib.util
import os
from typing import Any

import pytest
import torch

from amtss_fast import ops

# Without a GPU the Triton kernels run in Triton's interpreter, which takes seconds where a GPU takes microseconds.
# There, of these grids only every n-th case runs on the backend "triton" (0: none); AMTSS_TEST_ALL=1 runs them all.
INTERPRETED_GRIDS = {
    "test_budget": 5,
    "test_budget_of_mixed_types": 7,
    "test_budget_of_many_teachers": 4,
    "test_budget_at_250002_classes": 2,
    "test_nan_stays_in_its_row": 3,
    "test_opcheck": 4,
    "test_a_scaled_float16_loss_does_not_underflow": 0,
    "test_heads_within_budget": 6,
    "test_heads_of_any_dtype": 4,
    "test_heads_of_250002_classes": 0,
    "test_operator_of_the_heads": 2,
    "test_the_gradient_of_a_bfloat16_head_is_summed_in_float32": 0,
}


def pytest_configure(config: pytest.Config) -> None:
    # Before anything imports Triton.
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
        if importlib.util.find_spec("triton") is not None:
            patch_once_per_launch()


def patch_once_per_launch() -> None:
    """Triton's interpreter patches its language again whenever a device function is called: half of its time."""
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch_lang(function: Any) -> Any:
        namespace = id(function.__globals__)
        if namespace in patched:
            return None
        patched.add(namespace)
        return patch(function)

    def call(*args: Any, **kwargs: Any) -> None:
        # The end of a launch takes the patches of its kernel back.
        patched.clear()
        launch(*args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_lang, call


def available_backends() -> list[str]:
    return [name for name in ops.BACKENDS if ops.why_missing(name) is None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", available_backends())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        # `pytest -m gpu` is what only a GPU can show.
        for item in items:
            backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
            if backend == "triton" or item.path.name == "test_triton.py":
                item.add_marker("gpu")
    if torch.cuda.is_available() or os.environ.get("AMTSS_TEST_ALL") == "1":
        return
    seen: collections.Counter[str] = collections.Counter()
    left_out = []
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            name = item.originalname
            if item.callspec.params.get("backend") == "triton" and name in INTERPRETED_GRIDS:
                nth = INTERPRETED_GRIDS[name]
                if nth == 0 or seen[name] % nth:
                    left_out.append(item)
                seen[name] += 1
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


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
