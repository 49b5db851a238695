"""`amtss-fast train`."""

from __future__ import annotations

import argparse

from amtss_fast.cli.common import add_config, show_results

SUMMARY = "train the teachers and the student of a configuration, and write a report"
DETAILS = """examples:
  amtss-fast train demo output_dir=runs/short training.num_train_epochs=1
  amtss-fast train my.yaml --resume
  torchrun --nproc-per-node 4 -m amtss_fast.cli train my.yaml"""
INTERRUPTED = """the same command with --resume (in the place of --overwrite) goes on
finished models are kept, the one in training continues from its last checkpoint, if it has one"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace the run that is in output_dir")
    existing.add_argument("--resume", action="store_true", help="continue the interrupted run that is in output_dir")


def run(options: argparse.Namespace) -> None:
    from amtss_fast._system.processes import leave_process_group
    from amtss_fast.runs import distil, load_config

    config = load_config(options.config, options.overrides)
    show_results(distil(config, overwrite=options.overwrite, resume=options.resume))
    leave_process_group()
