"""`amtss-fast doctor`."""

from __future__ import annotations

import argparse
import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version

SUMMARY = "print versions, devices, and the backends that run here or why they do not"
DETAILS = ""

_PACKAGES = ("amtss-fast", "torch", "triton", "transformers", "datasets", "accelerate", "bitsandbytes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It has none."""


def run(options: argparse.Namespace) -> None:
    print(f"Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    for name in _PACKAGES:
        print(f"{name:14} {_version(name)}")
    _print_devices()
    _print_backends()
    if importlib.util.find_spec("transformers") is None:
        print("training       missing: pip install 'amtss-fast[train]'")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _print_devices() -> None:
    import torch

    print(f"{'CPU':14} {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for index in range(torch.cuda.device_count()):
        print(f"{f'GPU {index}':14} {torch.cuda.get_device_name(index)}")
    if not torch.cuda.is_available():
        print(f"{'GPU':14} none that torch can use")


def _print_backends() -> None:
    from amtss_fast.loss import registry

    for name in registry.BACKENDS:
        print(f"backend {name:9} {registry.why_missing(name) or 'ready'}")
    if registry.why_missing("cpu") is None:
        from amtss_fast.loss.backends import cpu

        print(f"{'CPU kernel':17} {cpu.instruction_set()}")
