"""`amtss-fast check`."""

from __future__ import annotations

import argparse

from amtss_fast.cli.common import add_config

SUMMARY = "check a configuration, its data and its models, and print the plan of the run; nothing is trained or written"
DETAILS = """`train`, `cache` and `add-language` check the same before they start.

examples:
  amtss-fast check my.yaml
  amtss-fast check demo data.max_length=64"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)


def run(options: argparse.Namespace) -> None:
    from amtss_fast.runs import load_config, preview

    print(preview(load_config(options.config, options.overrides)))
