"""The engines that run 8-bit teachers, and which of them runs here."""

from __future__ import annotations

import platform
from importlib.util import find_spec

import torch

from amtss_fast._compat.torch import has_onednn_int8
from amtss_fast._compat.transformers import why_no_int8_loading
from amtss_fast.errors import UserError
from amtss_fast.loss.backends import cpu
from amtss_fast.teachers.int8 import kernels
from amtss_fast.teachers.int8.layers import LAYERS

ENGINES = ("native", "onednn", "bitsandbytes", "torchao")
"""`native` is this package's matrix product, for CPUs with AVX-512 VNNI; `onednn` is torch's own, on x86 CPUs; the two
others are packages of that name."""


def why_missing(engine: str) -> str | None:
    """Why an engine of `ENGINES` cannot run here; None if it can."""
    return why_no_int8_loading() or _why_no_products(engine)


def _why_no_products(engine: str) -> str | None:
    if engine == "native":
        return cpu.why_missing() or (None if kernels.has_int8() else "it needs a CPU with AVX-512 VNNI")
    if engine == "onednn":
        if platform.machine() not in ("x86_64", "AMD64"):
            return f"it runs on x86-64 CPUs, this is {platform.machine()}"
        return None if has_onednn_int8() else "this build of torch lacks oneDNN's quantized operators"
    return None if find_spec(engine) else f"it is not installed: pip install {engine}"


def choose_engine(engine: str | None, device: torch.device) -> str:
    """The engine asked for. Default: bitsandbytes on CUDA; on CPUs native, or onednn where native cannot run.

    Raises:
        UserError: an unknown engine, or one that does not run on this device.
        ImportError: an engine that is missing, or a transformers that is too old; the message names what is needed.
    """
    if engine is not None and engine not in ENGINES:
        raise UserError(f"engine must be one of {', '.join(ENGINES)}; got {engine!r}")
    chosen = engine or _default_engine(device)
    if chosen in LAYERS and device.type != "cpu":
        raise UserError(f"engine {chosen!r} runs on the CPU, not on {device}")
    missing = why_missing(chosen)
    if missing is not None:
        raise ImportError(f"engine {chosen!r}: {missing}")
    return chosen


def _default_engine(device: torch.device) -> str:
    if device.type == "cuda":
        return "bitsandbytes"
    return "onednn" if why_missing("native") else "native"
