"""`amtss-fast add-language`."""

from __future__ import annotations

import argparse

from amtss_fast.cli.common import OVERRIDES, add_overrides, path, show_results

SUMMARY = "add a language to the student of a run without changing the other languages' outputs"
DETAILS = """The projection of the new language starts as a copy of the nearest language's, and only it is trained.
RUN is not changed. The new run (default: RUN-CODE beside it) reports all languages before and after.

examples:
  amtss-fast add-language runs/demo sw data=sw.csv
  amtss-fast add-language runs/demo sw data=texts.jsonl data.language_default=sw data.label=null
  amtss-fast add-language runs/demo sw --rows 200 --replay training.max_steps=500"""
INTERRUPTED = "RUN is as it was; the same command with --overwrite begins again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=path, help="the folder of a run")
    parser.add_argument("code", help="the new language")
    add_overrides(parser, f"data=FILE (its texts), and {OVERRIDES}")
    parser.add_argument(
        "--like", default="nearest", help="the language to start from, or nearest, or mean (default: %(default)s)"
    )
    parser.add_argument("--own-classifier", action="store_true", help="give each language a classifier of its own")
    parser.add_argument("--replay", action="store_true", help="train the whole student, on old and new texts")
    parser.add_argument("--rows", type=int, help="the most training texts of the new language (default: all)")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that is in the new folder")


def run(options: argparse.Namespace) -> None:
    from amtss_fast.runs import add_language

    folder = add_language(
        options.run,
        options.code,
        options.overrides,
        like=options.like,
        own_classifier=options.own_classifier,
        replay=options.replay,
        rows=options.rows,
        overwrite=options.overwrite,
    )
    show_results(folder)
