"""The backends that this machine has; tests that take `backend` run on each of them."""

from __future__ import annotations

import pytest

from amtss_fast import ops


def available_backends() -> list[str]:
    return [name for name in ops.BACKENDS if ops.why_missing(name) is None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", available_backends())
