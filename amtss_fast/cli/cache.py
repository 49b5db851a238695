"""`amtss-fast cache`."""

from __future__ import annotations

import argparse

from amtss_fast.cli.common import add_config

SUMMARY = "compute the teachers' logits of a run once"
DETAILS = """`train` reads them from then on. If it is interrupted, the same command continues where it stopped.

examples:
  amtss-fast cache my.yaml teacher_cache.path=runs/cache
  accelerate launch -m amtss_fast.cli cache my.yaml"""
INTERRUPTED = "the same command continues where it stopped"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)


def run(options: argparse.Namespace) -> None:
    from amtss_fast.runs import compute_cache, load_config

    print("\n".join(compute_cache(load_config(options.config, options.overrides))))
