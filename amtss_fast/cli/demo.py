"""`amtss-fast demo`."""

from __future__ import annotations

import argparse

from amtss_fast.cli.common import add_overrides, show_results

SUMMARY = "train teachers and a student on embedded texts, and print the results"
DETAILS = ""
INTERRUPTED = "amtss-fast train demo --resume, with the same settings, goes on"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_overrides(parser)


def run(options: argparse.Namespace) -> None:
    from amtss_fast.runs import distil, load_config

    show_results(distil(load_config("demo", options.overrides), overwrite=True))
