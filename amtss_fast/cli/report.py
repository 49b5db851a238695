"""`amtss-fast report`."""

from __future__ import annotations

import argparse

from amtss_fast.cli.common import path, show_results

SUMMARY = "write report.html of a run again, and print its table"
DETAILS = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=path, help="the folder of a run")


def run(options: argparse.Namespace) -> None:
    from amtss_fast.runs.report import write_report

    write_report(options.run)
    show_results(options.run)
