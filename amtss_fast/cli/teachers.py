"""`amtss-fast teachers`."""

from __future__ import annotations

import argparse
import json

from amtss_fast.cli.common import add_config, positive

SUMMARY = "measure how 16 and 8 bits change a run's teachers, and recommend a precision"
DETAILS = """examples:
  amtss-fast teachers check my.yaml
  amtss-fast teachers check my.yaml --precisions int8 --rows 300"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["check"], help="what to do")
    add_config(parser)
    parser.add_argument("--precisions", default="bfloat16,int8", help="comma-separated (default: %(default)s)")
    parser.add_argument("--rows", type=positive, default=960, help="rows to compare them on (default: %(default)s)")
    parser.add_argument("--batch-size", type=positive, default=32, help="rows per forward pass (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def run(options: argparse.Namespace) -> None:
    from amtss_fast.runs import check_teachers, load_config
    from amtss_fast.teachers.precision import format_changes

    config = load_config(options.config, options.overrides)
    results = check_teachers(config, options.precisions.split(","), options.rows, options.batch_size)
    names = [teacher.name for teacher in config.teachers]
    print(json.dumps(results, ensure_ascii=False) if options.json else format_changes(results, names))
