"""The same distillation four times on a CPU: wall time by part, peak memory, accuracy.

    python benchmarks/bench_train.py                          the full one: hours on two cores
    python benchmarks/bench_train.py --rows 3200 --epochs 1 --teacher-steps 40
    python benchmarks/bench_train.py --ways plain,int8 --json FILE
    python benchmarks/bench_train.py --config my.yaml         models and data of one's own

Three teachers of 12 x 384, a student of 4 x 384 (bench_train.yaml), cldr_topic in 15 languages, all labels, batches of
32, AdamW. Every teacher teaches every language, so that no way is faster for asking fewer teachers. The ways:

    plain        a loop with float32 teachers and the formula of the loss in plain torch
    textbrewer   TextBrewer's MultiTeacherDistiller (pip install textbrewer): the mean of float32 teachers' logits
    int8         AMTSSTrainer, teachers in 8 bits
    cached       AMTSSTrainer from cached logits of the 8-bit teachers; computing the cache is counted

Each way runs in a process of its own. `student` is what the other parts leave: its forward and backward pass, the
optimizer and the loop. Peak memory is the largest resident set beyond that before the teachers were loaded; `anonymous`
is without pages of mapped files, where float32 weights lie on CPUs. The teachers are trained first, if they are not
there yet, and are the same for all ways.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_teachers import Peak
from cases import machine, plain
from datasets import DatasetDict
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from amtss_fast import AMTSSTrainer
from amtss_fast._system.files import write_atomically
from amtss_fast.data import DistillationCollator
from amtss_fast.runs import (
    RunConfig,
    cached_teachers,
    load_config,
    load_teachers,
    new_student,
    prepare,
    train_teachers,
)
from amtss_fast.runs.caching import compute_logits
from amtss_fast.runs.config import CacheConfig
from amtss_fast.runs.setup import student_arguments
from amtss_fast.teachers import CachedTeachers
from amtss_fast.training import evaluate
from amtss_fast.training.evaluation import STUDENT
from amtss_fast.training.tasks import classification

WAYS = ("plain", "textbrewer", "int8", "cached")
CONFIG = Path(__file__).with_suffix(".yaml")
INPUTS = ("input_ids", "attention_mask", "language_ids")

parts: dict[str, float] = defaultdict(float)


def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, its seconds added to a part."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            parts[part] += time.perf_counter() - started

    return wrapped


class Work:
    """What all ways share: data, collator, a student with the same first weights."""

    def __init__(self, config: RunConfig, rows: int, test_rows: int) -> None:
        # The tokenizer is that of all training texts, as the teachers' is.
        setup = prepare(config)
        generator = np.random.default_rng(0)
        for split, n in (("train", rows), ("test", test_rows)):
            data = setup.data[split]
            if n < len(data):
                setup.data[split] = data.select(np.sort(generator.choice(len(data), n, replace=False)))
        self.setup = setup
        self.arguments = student_arguments(config)
        self.train = setup.encode(setup.data["train"])
        self.test = setup.encode(setup.data["test"])
        self.collate = timed("data", DistillationCollator(setup.tokenizer))
        self.student = new_student(setup)

    @property
    def steps(self) -> int:
        batches = -(-len(self.train) // self.arguments.per_device_train_batch_size)
        return batches * int(self.arguments.num_train_epochs)

    def loader(self) -> Any:
        return torch.utils.data.DataLoader(
            self.train,
            batch_size=self.arguments.per_device_train_batch_size,
            shuffle=True,
            collate_fn=self.collate,
            generator=torch.Generator().manual_seed(0),
        )

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.student.parameters(), lr=self.arguments.learning_rate, weight_decay=0.0)

    def teachers(self, precision: str) -> Any:
        configured = self.setup.config.teachers
        return load_teachers(self.setup, [t.model_copy(update={"precision": precision}) for t in configured])


def plain_loop(work: Work) -> None:
    teachers = [teacher.model for teacher in work.teachers("float32").teachers]
    optimizer = work.optimizer()
    schedule = get_cosine_schedule_with_warmup(optimizer, work.steps // 10, work.steps)
    loss_fn = timed("loss", plain)
    work.student.train()

    @timed_with("teachers")
    def ask(inputs: dict[str, Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return [teacher(**inputs).logits for teacher in teachers]

    for _ in range(int(work.arguments.num_train_epochs)):
        for batch in work.loader():
            inputs = {name: batch[name] for name in INPUTS}
            teacher_logits = ask(inputs)
            logits = work.student(**inputs).logits
            loss = loss_fn(logits, teacher_logits, batch["labels"])
            loss = loss + 0.5 * torch.nn.functional.cross_entropy(logits, batch["labels"])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(work.student.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def timed_with(part: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return lambda function: timed(part, function)


def textbrewer_loop(work: Work) -> None:
    from textbrewer import DistillationConfig, MultiTeacherDistiller, TrainingConfig

    teachers = [teacher.model for teacher in work.teachers("float32").teachers]
    for teacher in teachers:
        teacher.forward = timed("teachers", teacher.forward)
    work.student.train()

    def adaptor(batch: Any, outputs: Any) -> dict[str, Any]:
        found = {"logits": (outputs.logits,)}
        return found if outputs.loss is None else {**found, "losses": (outputs.loss,)}

    # The student gets the labels, its own loss is the cross entropy; the teachers compute one too, of three classes.
    with tempfile.TemporaryDirectory() as folder:
        distiller = MultiTeacherDistiller(
            TrainingConfig(device="cpu", output_dir=folder, log_dir=None),
            DistillationConfig(temperature=2.0, kd_loss_type="ce", kd_loss_weight=1.0, hard_label_weight=0.5),
            teachers,
            work.student,
            adaptor,
            adaptor,
        )
        distiller.kd_loss = timed("loss", distiller.kd_loss)
        with distiller:
            distiller.train(
                work.optimizer(),
                work.loader(),
                int(work.arguments.num_train_epochs),
                scheduler_class=get_cosine_schedule_with_warmup,
                scheduler_args={"num_warmup_steps": work.steps // 10, "num_training_steps": work.steps},
                max_grad_norm=1.0,
            )


def own_trainer(work: Work, cached: bool) -> None:
    if not cached:
        train_own(work, work.teachers("int8"), work.train)
        return
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        changes = {
            "teacher_cache": CacheConfig(path=folder),
            "teachers": [t.model_copy(update={"precision": "int8"}) for t in work.setup.config.teachers],
        }
        setup = replace(work.setup, config=work.setup.config.model_copy(update=changes))
        compute_logits(setup)
        teachers = cached_teachers(setup)
        parts["teachers"] += time.perf_counter() - started
        rows = teachers.number_rows(DatasetDict(train=work.train))["train"]
        train_own(work, teachers, rows)


def train_own(work: Work, pool: Any, rows: Any) -> None:
    if isinstance(pool, CachedTeachers):
        vars(pool)["logits"] = timed("data", pool.logits)
    else:
        # On a CPU they are done when this returns.
        vars(pool)["ask"] = timed("teachers", pool.ask)
    # The task looks the loss up in its module.
    module: Any = classification
    module.amtss_loss = timed("loss", module.amtss_loss)
    AMTSSTrainer(
        work.student,
        work.arguments,
        teachers=pool,
        train_dataset=rows,
        data_collator=work.collate,
        processing_class=work.setup.tokenizer,
    ).train()


def one_way(way: str, config: RunConfig, rows: int, test_rows: int) -> dict[str, Any]:
    """Called in a process of its own."""
    work = Work(config, rows, test_rows)
    parts.clear()
    started = time.perf_counter()
    with Peak() as peak:
        if way == "plain":
            plain_loop(work)
        elif way == "textbrewer":
            textbrewer_loop(work)
        else:
            own_trainer(work, cached=way == "cached")
        total = time.perf_counter() - started
    setup = work.setup
    found = evaluate(setup.task, work.test, setup.collator(), {STUDENT: work.student}, setup.languages)[STUDENT]
    return {
        "way": way,
        "seconds": total,
        **{f"{part}_s": parts[part] for part in ("teachers", "loss", "data")},
        "student_s": total - sum(parts.values()),
        "peak_mb": peak.with_files / 1e6,
        "anonymous_mb": peak.bytes / 1e6,
        "accuracy": found["accuracy"],
        "steps": work.steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG, help="default: %(default)s")
    parser.add_argument("--rows", type=int, default=10**9, help="training texts (default: all)")
    parser.add_argument("--test-rows", type=int, default=10**9, help="test texts (default: all)")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--teacher-steps", type=int, help="default: what bench_train.yaml says")
    parser.add_argument("--output-dir", default="runs/bench_train", help="keeps the teachers (default: %(default)s)")
    parser.add_argument("--ways", default=",".join(WAYS), help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    settings = [
        f"output_dir={args.output_dir}",
        f"training.num_train_epochs={args.epochs}",
        "training.disable_tqdm=true",
        "training.report_to=none",
        "training.logging_steps=1000000",
        "training.train_sampling_strategy=random",
        "teacher_training.disable_tqdm=true",
    ]
    if args.teacher_steps:
        settings.append(f"teacher_training.max_steps={args.teacher_steps}")
    config = load_config(args.config, settings)
    if args.one:
        print(json.dumps(one_way(args.one, config, args.rows, args.test_rows)))
        return
    setup = prepare(config, resume=True)
    setup.folder.open(config, resume=True)
    train_teachers(setup)
    about = machine()
    print(*(f"{key}: {value}" for key, value in about.items()), sep="\n")
    rows: list[dict[str, Any]] = []
    for way in args.ways.split(","):
        command = [sys.executable, __file__, "--one", way, "--rows", str(args.rows), "--test-rows", str(args.test_rows)]
        command += ["--epochs", str(args.epochs), "--output-dir", args.output_dir, "--config", str(args.config)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{way}: {done.stderr[-3000:]}")
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
    if args.json:
        size = {"rows": args.rows, "epochs": args.epochs, "teacher_steps": args.teacher_steps}
        # Ways measured before, of the same size, are kept.
        known = json.loads(args.json.read_text()) if args.json.exists() else {}
        if all(known.get(name) == value for name, value in size.items()):
            rows += [row for row in known["ways"] if row["way"] not in {own["way"] for own in rows}]
        seconds = {row["way"]: row["seconds"] for row in rows}
        for row in rows:
            if "plain" in seconds:
                row["speedup"] = seconds["plain"] / row["seconds"]
        write_atomically(args.json, json.dumps({"machine": about, **size, "ways": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
