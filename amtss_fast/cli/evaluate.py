"""`amtss-fast evaluate`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from amtss_fast.cli.common import add_overrides, inference_device
from amtss_fast.errors import UserError, user_errors

SUMMARY = "print the accuracy of a run's student in each language"
DETAILS = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="the folder of a run")
    add_overrides(parser)
    parser.add_argument("--split", default="test", help="the split to evaluate on (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def run(options: argparse.Namespace) -> None:
    from amtss_fast.data import DistillationCollator, encode
    from amtss_fast.models import AMTSSForSequenceClassification, load_tokenizer
    from amtss_fast.runs import load_config, load_run_data
    from amtss_fast.runs.report import format_table
    from amtss_fast.training import evaluate, find_task
    from amtss_fast.training.evaluation import STUDENT

    config = load_config(options.run / "config.yaml", options.overrides)
    if config.task != "sequence-classification":
        raise UserError(
            f"evaluate is for classifiers; {options.run} is a run of task {config.task!r}, see metrics.json"
        )
    folder = options.run / "student"
    with user_errors():
        student = AMTSSForSequenceClassification.from_pretrained(folder, device_map=inference_device())
        tokenizer = load_tokenizer(folder)
        data = load_run_data(config)
        if options.split not in data:
            raise UserError(f"--split {options.split}: the data has {', '.join(data)}")
        languages = student.config.languages
        rows = encode(data[options.split], tokenizer, languages=languages, max_length=config.data.max_length)
    collator = DistillationCollator(tokenizer)
    results = evaluate(find_task(config.task), rows, collator, {STUDENT: student}, languages)
    if options.json:
        print(json.dumps(results[STUDENT], ensure_ascii=False))
    else:
        print(format_table({"languages": languages, "test": results}))
