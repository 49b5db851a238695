"""A canary: which private name this version of Triton lacks. The kernels then run, with more compilations or slower."""

from typing import Any

import pytest

pytest.importorskip("triton", reason="the package triton is not installed")

import triton
import triton.language as tl

from amtss_fast._compat import triton as private


@pytest.mark.parametrize("path", private.PRIVATE)
def test_private_names_exist(path: str) -> None:
    assert private.exists(path), f"triton {triton.__version__} has no triton.{path}"


def test_what_does_not_exist() -> None:
    assert not private.exists("compiler.CompiledKernel.no_such_method")
    assert not private.exists("no_such_module.function")
    assert not private.exists("jit(no_such_parameter)")


def test_only_runtime_arguments_are_not_specialized(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(private.triton, "jit", lambda function, **options: given.update(options))

    def kernel(x, n: tl.int64, LENGTH: tl.constexpr) -> None: ...  # type: ignore[no-untyped-def]

    private.jit_without_specialization(kernel)
    assert given == {"do_not_specialize": ["x", "n"], "do_not_specialize_on_alignment": ["x", "n"]}
    given.clear()
    monkeypatch.setattr(private, "_ignores_alignment", False)
    private.jit_without_specialization(kernel)
    assert given == {"do_not_specialize": ["x", "n"]}


@pytest.mark.parametrize("gone", ["_ignores_alignment", "_has_direct_launch"])
def test_no_direct_launch_without_its_names(monkeypatch: pytest.MonkeyPatch, gone: str) -> None:
    compiled: dict[tuple[int, int, int], str] = {(1, 1, 1): "launcher"}
    launch = private.direct_launch(compiled)
    assert launch is not None
    assert launch((1, 1, 1)) == "launcher"
    monkeypatch.setattr(private, gone, False)
    assert private.direct_launch(compiled) is None


def test_no_direct_launch_by_old_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "_version", (3, 2))
    assert private.direct_launch({}) is None
