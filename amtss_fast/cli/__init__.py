"""The command line `amtss-fast`."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

OVERRIDES = "settings of the configuration to change, by dotted name: training.num_train_epochs=2 data.max_length=64"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status. What the user can mend is one line on stderr, anything else a trace."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse ends a list of positional arguments at the first option: `train demo --resume key=value`.
    options.overrides = [*getattr(options, "overrides", []), *rest]
    if rest and (
        options.command not in (_demo, _train, _cache, _teachers, _evaluate, _add_language)
        or any(item.startswith("-") for item in rest)
    ):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        options.command(options)
    except (ValueError, TypeError, FileNotFoundError, FileExistsError, ImportError) as error:
        if options.trace:
            raise
        print(f"amtss-fast {options.name}: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="amtss-fast", description="Distil several teachers into one multilingual student."
    )
    parser.add_argument("--trace", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")

    def add(name: str, command: Any, help: str, description: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=help,
            description=f"{help[0].upper()}{help[1:]}. {description}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(command=command)
        return sub

    demo = add("demo", _demo, "train teachers and a student on embedded texts, and show what came of it")
    demo.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)

    train = add(
        "train",
        _train,
        "carry out the run that a YAML file describes",
        "\n\nexamples:\n"
        "  amtss-fast train demo output_dir=runs/short training.num_train_epochs=1\n"
        "  amtss-fast train my.yaml --resume\n"
        "  torchrun --nproc-per-node 4 -m amtss_fast.cli train my.yaml",
    )
    train.add_argument("config", help="a YAML file, or a shipped configuration by name (demo, xnli)")
    train.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)
    how = train.add_mutually_exclusive_group()
    how.add_argument("--overwrite", action="store_true", help="replace the run that output_dir holds")
    how.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped")

    cache = add(
        "cache",
        _cache,
        "compute the teachers' logits of a run once",
        "`train` reads them from then on. Killed, it goes on where it was when started again.\n\nexamples:\n"
        "  amtss-fast cache my.yaml teacher_cache.path=runs/cache\n"
        "  accelerate launch -m amtss_fast.cli cache my.yaml",
    )
    cache.add_argument("config", help="a YAML file, or a shipped configuration by name")
    cache.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)

    teachers = add(
        "teachers",
        _teachers,
        "measure what 16 and 8 bits change in a run's teachers, and say which precision to use",
        "\n\nexamples:\n"
        "  amtss-fast teachers check my.yaml\n"
        "  amtss-fast teachers check my.yaml --precisions int8 --rows 300",
    )
    teachers.add_argument("action", choices=["check"], help="what to do")
    teachers.add_argument("config", help="a YAML file, or a shipped configuration by name")
    teachers.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)
    teachers.add_argument("--precisions", default="bfloat16,int8", help="comma-separated (default: %(default)s)")
    teachers.add_argument("--rows", type=int, default=960, help="rows to ask them about (default: %(default)s)")
    teachers.add_argument("--batch-size", type=int, default=32, help="rows per forward pass (default: %(default)s)")
    teachers.add_argument("--json", action="store_true", help="print JSON in place of the table")

    new = add(
        "add-language",
        _add_language,
        "teach the student of a run another language, without moving the others",
        "\nIts projection starts as a copy of the nearest language's and is trained alone. RUN stays as it is; the\n"
        "new run (default: RUN-CODE beside it) reports all languages before and after."
        "\n\nexamples:\n"
        "  amtss-fast add-language runs/demo sw data=sw.csv\n"
        "  amtss-fast add-language runs/demo sw data=texts.jsonl data.language_default=sw data.label=null\n"
        "  amtss-fast add-language runs/demo sw --rows 200 --replay training.max_steps=500",
    )
    new.add_argument("run", type=Path, help="the folder of a run")
    new.add_argument("code", help="the new language")
    new.add_argument("overrides", nargs="*", metavar="key=value", help=f"data=FILE (its texts), and {OVERRIDES}")
    new.add_argument("--like", default="nearest", help="nearest, mean, or a language to start from (default: nearest)")
    new.add_argument("--own-classifier", action="store_true", help="give each language a classifier of its own")
    new.add_argument("--replay", action="store_true", help="train the whole student on old and new texts")
    new.add_argument("--rows", type=int, help="the most training texts of the new language")
    new.add_argument("--overwrite", action="store_true", help="replace the new run if it is there")

    evaluate = add("evaluate", _evaluate, "accuracy of a run's student in each language")
    evaluate.add_argument("run", type=Path, help="the folder of a run")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES)
    evaluate.add_argument("--split", default="test", help="the split to evaluate on (default: %(default)s)")
    evaluate.add_argument("--json", action="store_true", help="print JSON in place of the table")

    predict = add(
        "predict",
        _predict,
        "classify texts, one JSON line each",
        "\n\nexamples:\n"
        "  echo 'a red apple' | amtss-fast predict runs/demo --language en\n"
        "  amtss-fast predict runs/demo --jsonl texts.jsonl",
    )
    predict.add_argument("run", type=Path, help="the folder of a run, or of a saved student")
    predict.add_argument("file", nargs="?", help="one text per line (default: standard input)")
    predict.add_argument("--language", help="the language of all texts")
    predict.add_argument(
        "--jsonl",
        action="store_true",
        help='lines are JSON: {"text": ..., "language": ..., "text_pair": ...}; language and text_pair may be left out',
    )
    predict.add_argument("--batch-size", type=int, default=32, help="texts per forward pass (default: %(default)s)")

    report = add("report", _report, "write a run's report.html again and print its table")
    report.add_argument("run", type=Path, help="the folder of a run")

    add("doctor", _doctor, "versions, devices, and the backends that run here or why they do not")
    return parser


def _demo(options: argparse.Namespace) -> None:
    from amtss_fast.runs.config import load_config
    from amtss_fast.runs.run import run

    _show(run(load_config("demo", options.overrides), overwrite=True))


def _train(options: argparse.Namespace) -> None:
    from amtss_fast.runs.config import load_config
    from amtss_fast.runs.run import run

    folder = run(load_config(options.config, options.overrides), overwrite=options.overwrite, resume=options.resume)
    _show(folder)
    leave_process_group()


def leave_process_group() -> None:
    """Under torchrun, the end of every process.

    A thread of the group that lets go of a tensor while Python ends is aborted, and the launcher then stops the other
    processes: all of them are to be through, and those threads idle.
    """
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        time.sleep(0.2)
        distributed.destroy_process_group()


def _cache(options: argparse.Namespace) -> None:
    from amtss_fast.runs.config import load_config
    from amtss_fast.runs.run import compute_cache

    print("\n".join(compute_cache(load_config(options.config, options.overrides))))


def _teachers(options: argparse.Namespace) -> None:
    from amtss_fast.runs.config import load_config
    from amtss_fast.runs.run import check_teachers
    from amtss_fast.teachers.precision import format_changes

    config = load_config(options.config, options.overrides)
    results = check_teachers(config, options.precisions.split(","), options.rows, options.batch_size)
    names = [teacher.name for teacher in config.teachers]
    print(json.dumps(results, ensure_ascii=False) if options.json else format_changes(results, names))


def _add_language(options: argparse.Namespace) -> None:
    from amtss_fast.runs.new_language import add_language

    names = ("like", "own_classifier", "replay", "rows", "overwrite")
    chosen = {name: getattr(options, name) for name in names}
    _show(add_language(options.run, options.code, options.overrides, **chosen))


def _report(options: argparse.Namespace) -> None:
    from amtss_fast.runs.report import write_report

    write_report(options.run)
    _show(options.run)


def _show(folder: Path) -> None:
    from amtss_fast.runs.report import format_table, read_run

    if (folder / "metrics.json").is_file():
        print(f"\n{format_table(read_run(folder).metrics)}\n\n{folder / 'report.html'}")


def _evaluate(options: argparse.Namespace) -> None:
    from amtss_fast.data.load import encode
    from amtss_fast.models.student import AMTSSForSequenceClassification, load_tokenizer
    from amtss_fast.runs.config import load_config
    from amtss_fast.runs.report import format_table
    from amtss_fast.runs.run import load_run_data
    from amtss_fast.training.evaluation import STUDENT, evaluate

    config = load_config(options.run / "config.yaml", options.overrides)
    if config.task != "sequence-classification":
        raise ValueError(
            f"evaluate is for classifiers; {options.run} is a run of task {config.task!r}, see metrics.json"
        )
    folder = options.run / "student"
    student = AMTSSForSequenceClassification.from_pretrained(folder, device_map=_device())
    tokenizer = load_tokenizer(folder)
    data = load_run_data(config)
    if options.split not in data:
        raise ValueError(f"--split {options.split}: the data has {', '.join(data)}")
    languages = student.config.languages
    rows = encode(data[options.split], tokenizer, languages=languages, max_length=config.data.max_length)
    results = evaluate(rows, tokenizer, {STUDENT: student})
    if options.json:
        print(json.dumps(results[STUDENT], ensure_ascii=False))
    else:
        print(format_table({"languages": languages, "test": results}))


def _predict(options: argparse.Namespace) -> None:
    from transformers import AutoConfig

    from amtss_fast.models.student import AMTSSForSequenceClassification

    folder = options.run / "student" if (options.run / "student").is_dir() else options.run
    if (model_type := AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type) != "amtss":
        raise ValueError(f"predict is for classifiers, {folder} holds a model of type {model_type!r}")
    student = AMTSSForSequenceClassification.from_pretrained(folder, device_map=_device())
    # Enough rows at once that sorting by length pays, few enough that the first answers come soon.
    for rows in _chunks(_read_rows(options), 32 * options.batch_size):
        paired = [row["text_pair"] is not None for row in rows]
        if any(paired) != all(paired):
            raise ValueError("either every row has a text_pair or none has")
        predictions = student.predict(
            [row["text"] for row in rows],
            [row["language"] for row in rows],
            text_pairs=[row["text_pair"] for row in rows] if all(paired) else None,
            batch_size=options.batch_size,
        )
        for row, prediction in zip(rows, predictions, strict=True):
            answer = {
                **{name: value for name, value in row.items() if value is not None},
                "label": prediction.label,
                "score": round(prediction.score, 6),
                "probabilities": {name: round(p, 6) for name, p in prediction.probabilities.items()},
            }
            print(json.dumps(answer, ensure_ascii=False), flush=True)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _read_rows(options: argparse.Namespace) -> Iterator[dict[str, str | None]]:
    source = sys.stdin if options.file is None else open(options.file, encoding="utf-8")  # noqa: SIM115
    with source:
        for number, line in enumerate(source, 1):
            row: Any = {"text": line.rstrip("\n")}
            if options.jsonl:
                row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise ValueError(f'line {number}: expected {{"text": ...}}, found {line.strip()[:80]}')
            language = row.get("language") or options.language
            if language is None:
                raise ValueError(f"line {number}: no language; pass --language, or give one in each JSON line")
            yield {"text": row["text"], "text_pair": row.get("text_pair"), "language": language}


def _chunks(rows: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while chunk := list(itertools.islice(rows, size)):
        yield chunk


def _doctor(options: argparse.Namespace) -> None:
    import torch

    from amtss_fast.loss import registry

    print(f"Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    for name in ("amtss-fast", "torch", "triton", "transformers", "datasets", "accelerate", "bitsandbytes"):
        try:
            print(f"{name:14} {version(name)}")
        except PackageNotFoundError:
            print(f"{name:14} not installed")
    print(f"{'CPU':14} {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for index in range(torch.cuda.device_count()):
        print(f"{f'GPU {index}':14} {torch.cuda.get_device_name(index)}")
    if not torch.cuda.is_available():
        print(f"{'GPU':14} none that torch can use")
    for name in registry.BACKENDS:
        print(f"backend {name:9} {registry.why_missing(name) or 'ready'}")
    if registry.why_missing("cpu") is None:
        from amtss_fast.loss.backends import cpu

        print(f"{'CPU kernel':17} {cpu.instruction_set()}")
    if importlib.util.find_spec("transformers") is None:
        print("training half   missing: pip install 'amtss-fast[train]'")
