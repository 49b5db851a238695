"""Private interfaces of Triton: each is looked up once, and where one is missing the public, slower way is taken."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton

PRIVATE = (
    "jit(do_not_specialize_on_alignment)",
    "compiler.CompiledKernel.__getitem__",
    "runtime.interpreter.InterpreterBuilder.create_fma(z)",
)
"""Names below `triton` that this module uses, with the parameter of a function in parentheses."""

# From this version on, a compiled kernel takes all arguments of its function; before, only those that are no constants.
_FIRST_DIRECT_LAUNCH = (3, 3)


def exists(path: str) -> bool:
    """Whether this version of Triton has the name, and the parameter, at `path`."""
    names, _, parameter = path.rstrip(")").partition("(")
    value: Any = triton
    for name in names.split("."):
        value = getattr(value, name, None)
    return value is not None and (not parameter or parameter in inspect.signature(value).parameters)


_ignores_alignment, _has_direct_launch, _has_interpreted_fma = map(exists, PRIVATE)
_version = tuple(map(int, triton.__version__.split(".")[:2]))


def jit_without_specialization(function: Callable[..., Any]) -> Any:
    """`triton.jit` that compiles once for all values of the runtime arguments, whose types are annotated.

    Public way: Triton compiles again where another address or stride is a multiple of 16.
    """
    names = [p.name for p in inspect.signature(function).parameters.values() if not _is_constexpr(p)]
    alignment = {"do_not_specialize_on_alignment": names} if _ignores_alignment else {}
    return triton.jit(function, do_not_specialize=names, **alignment)


def _fma_rounded_once(self: Any, x: Any, y: Any, z: Any) -> Any:
    """The sum of x y and z in float32, exact until it is rounded, as on a GPU."""
    exact = x.data.astype("float64") * y.data + z.data
    return type(x)(exact.astype(x.data.dtype), z.dtype.scalar)


# Public way: Triton's interpreter rounds the product, too.
if _has_interpreted_fma:
    triton.runtime.interpreter.InterpreterBuilder.create_fma = _fma_rounded_once


def _is_constexpr(parameter: inspect.Parameter) -> bool:
    return parameter.annotation is triton.language.constexpr


def direct_launch(compiled: Any) -> Callable[[tuple[int, int, int]], Callable[..., Any]] | None:
    """From a grid, what launches a compiled kernel with all arguments of its function, in order.

    Public way: None. The kernel is then launched through its function, which finds the compiled kernel by the types of
    all arguments. That takes longer than the launch.
    """
    # Without the first name, one function has a compiled kernel for each alignment.
    if not (_ignores_alignment and _has_direct_launch and _version >= _FIRST_DIRECT_LAUNCH):
        return None
    return compiled.__getitem__  # type: ignore[no-any-return]
