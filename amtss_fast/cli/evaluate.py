"""`amtss-fast evaluate`."""

from __future__ import annotations

import argparse
import json

from amtss_fast.cli.common import add_overrides, inference_device, path
from amtss_fast.errors import NotFiniteError, UserError, user_errors

SUMMARY = "print the accuracy of a run's student in each language"
DETAILS = """Labels are aligned with the student's by name; ids in a file without names are the student's ids.

examples:
  amtss-fast evaluate runs/demo
  amtss-fast evaluate runs/demo data.name=new.csv --split train"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=path, help="the folder of a run")
    add_overrides(parser)
    parser.add_argument("--split", default="test", help="the split to evaluate on (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")


def run(options: argparse.Namespace) -> None:
    from amtss_fast.data import DistillationCollator, align_labels, encode
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
    student = AMTSSForSequenceClassification.from_pretrained(folder, device_map=inference_device())
    names, languages = student.config.label_names, student.config.languages
    if config.data.label_names is None:
        # A file may lack a class, or have names in another order: the student's names say what a label is.
        config = config.model_copy(update={"data": config.data.model_copy(update={"label_names": list(names)})})
    with user_errors():
        tokenizer = load_tokenizer(folder)
        data = align_labels(load_run_data(config), names)
        if options.split not in data:
            raise UserError(f"--split {options.split}: the data has {', '.join(data)}")
        rows = encode(data[options.split], tokenizer, languages=languages, max_length=config.data.max_length)
        if not any(label >= 0 for label in rows["labels"]):
            raise UserError(f"--split {options.split}: no row of it has a label")
    try:
        results = evaluate(find_task(config.task), rows, DistillationCollator(tokenizer), {STUDENT: student}, languages)
    except NotFiniteError as error:
        raise UserError(f"{folder}: {error}") from error
    if options.json:
        print(json.dumps(results[STUDENT], ensure_ascii=False, allow_nan=False))
    else:
        print(format_table({"languages": languages, "test": results}))
