"""What several commands share."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

OVERRIDES = "settings of the configuration to change, by dotted name: training.num_train_epochs=2 data.max_length=64"


def add_config(parser: argparse.ArgumentParser) -> None:
    """The arguments of a command that takes a configuration."""
    parser.add_argument("config", help="a YAML file, or a shipped configuration by name (demo, masked-lm, xnli)")
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser, help: str = OVERRIDES) -> None:
    """Settings that differ from those of the configuration."""
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=help)


def positive(text: str) -> int:
    """The type of arguments that are counts."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text}")
    return int(text)


def path(text: str) -> Path:
    """The type of arguments that are files and folders; `~` is the home folder."""
    return Path(os.path.expanduser(text))


def show_results(folder: Path) -> None:
    """Prints the table of a run, and where its report is, in the main process; nothing without results."""
    from accelerate import PartialState

    from amtss_fast.runs.report import format_table, read_run

    if PartialState().is_main_process and (folder / "metrics.json").is_file():
        print(f"\n{format_table(read_run(folder).metrics)}\n\n{folder / 'report.html'}")


def inference_device() -> str:
    """The device that a student is loaded on."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
