"""Memory, open files and threads of a process over many steps: none of them may grow.

    python benchmarks/long_runs.py                       10,000 steps of each part
    python benchmarks/long_runs.py --parts loss --steps 2000

The parts are `loss` (forward and backward on the CPU, shapes and dtypes in turn), `live` (the training loop with two
loaded teachers, the adaptive strategy, evaluations and checkpoints) and `cached` (the same from cached logits), with
models of two layers. Each part is a process of its own. Every tenth of the steps is sampled after a collection of
garbage; the first two samples are the warm-up. A part is flat if its memory (RSS) at the last sample is less than 8 MB
above the one after the warm-up, and no later sample has more open files or threads. Otherwise the script exits with 1.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from cases import machine
from datasets import DatasetDict
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback

from amtss_fast import AMTSSForSequenceClassification, amtss_loss
from amtss_fast.data import DistillationCollator, encode, load_data, train_tokenizer
from amtss_fast.teachers import CachedLogits, CachedTeachers, CacheEntry, TeacherPool, load_teacher, pool_logits
from amtss_fast.training import AMTSSTrainer, AMTSSTrainingArguments
from amtss_fast.training.callbacks import ShortPrinter

LANGUAGES = ["en", "fr", "ur"]
SAMPLES = 10
WARM_UP = 2
MOST_GROWTH = 8e6
# N, K, C: few classes, many rows, a vocabulary; the last has a row more than a block.
SHAPES = ((32, 3, 3), (1024, 4, 40), (16, 2, 5000), (257, 5, 7))


class Sample(NamedTuple):
    """What the process uses after a number of steps."""

    step: int
    rss: int
    files: int
    threads: int


class Watch:
    """Samples this process every tenth of the steps."""

    def __init__(self, steps: int) -> None:
        self.every = max(steps // SAMPLES, 1)
        self.samples: list[Sample] = []

    def after(self, step: int) -> None:
        """Call it after each step, numbered from 1."""
        if step % self.every:
            return
        gc.collect()
        process = psutil.Process()
        self.samples.append(Sample(step, process.memory_info().rss, process.num_fds(), process.num_threads()))


class Watches(TrainerCallback):
    """Watches a training."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Samples after each optimizer step."""
        self.watch.after(state.global_step)


def run_loss(steps: int, watch: Watch) -> None:
    """The loss and its gradient; new tensors in every step, as in a training."""
    options: tuple[dict[str, Any], ...] = (
        {},
        {"weight_temperature": 0.5, "return_stats": True},
        {"label_smoothing": 0.1, "reduction": "none"},
    )
    for step in range(1, steps + 1):
        n, k, c = SHAPES[step % len(SHAPES)]
        dtype = (torch.float32, torch.bfloat16)[step // len(SHAPES) % 2]
        student = torch.randn(n, c, dtype=dtype, requires_grad=True)
        teachers = [torch.randn(n, c, dtype=dtype) for _ in range(k)]
        labels = torch.randint(-1, c, (n,))
        result = amtss_loss(student, teachers, labels, ce_weight=0.5, backend="cpu", **options[step % len(options)])
        loss = result[0] if isinstance(result, tuple) else result
        loss.sum().backward()
        watch.after(step)


def run_live(steps: int, watch: Watch) -> None:
    """The training loop with loaded teachers."""
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(Path(folder), steps, watch).train()


def run_cached(steps: int, watch: Watch) -> None:
    """The training loop with cached logits."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(Path(folder), steps, watch)
        cache(trainer, Path(folder) / "cache")
        trainer.train()


def make_trainer(folder: Path, steps: int, watch: Watch) -> AMTSSTrainer:
    """A trainer of a small student with two untrained teachers, one of them of two languages."""
    torch.manual_seed(0)
    texts = load_data("cldr_topic", languages=LANGUAGES)
    names = texts["train"].features["label"].names
    tokenizer = train_tokenizer(texts["train"]["text"][:2000], 500)
    size: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    size |= {"vocab_size": len(tokenizer), "max_position_embeddings": 32}
    pool = []
    for name, languages in (("a", None), ("b", LANGUAGES[1:])):
        config = BertConfig(
            **size, id2label=dict(enumerate(names)), label2id={label: i for i, label in enumerate(names)}
        )
        BertForSequenceClassification(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        pool.append(load_teacher(folder / name, name=name, languages=languages))
    rows = {
        split: encode(
            texts[split].select(range(0, len(texts[split]), 8)), tokenizer, languages=LANGUAGES, max_length=16
        )
        for split in ("train", "validation")
    }
    arguments = AMTSSTrainingArguments(
        str(folder / "training"),
        max_steps=steps,
        per_device_train_batch_size=8,
        ce_weight=0.5,
        importance_temperature=0.1,
        gap_temperature=0.1,
        logging_steps=max(steps // 50, 1),
        eval_strategy="steps",
        eval_steps=max(steps // 10, 1),
        per_device_eval_batch_size=64,
        save_steps=max(steps // 10, 1),
        save_total_limit=1,
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
    )
    trainer = AMTSSTrainer(
        AMTSSForSequenceClassification.from_encoder(BertConfig(**size), languages=LANGUAGES, id2label=names),
        arguments,
        teachers=TeacherPool(pool, label_names=names, languages=LANGUAGES, tokenizer=tokenizer),
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        data_collator=DistillationCollator(tokenizer),
        processing_class=tokenizer,
        callbacks=[Watches(watch)],
    )
    # The table is all that is printed.
    trainer.remove_callback(ShortPrinter)
    return trainer


def cache(trainer: AMTSSTrainer, folder: Path) -> None:
    """Caches the logits of a trainer's teachers, which then take their place."""
    pool: Any = trainer.teachers
    tokenizer: Any = trainer.processing_class
    splits = DatasetDict({"train": trainer.train_dataset, "validation": trainer.eval_dataset})
    logits: list[list[CachedLogits]] = []
    for teacher in pool.teachers:
        alone = TeacherPool([teacher], label_names=pool.label_names, languages=LANGUAGES, tokenizer=tokenizer)
        logits.append([])
        for split, rows in splits.items():
            entry = CacheEntry(folder, teacher.name, split, {}, len(rows), len(pool.label_names), "codes", 500)
            entry.compute(pool_logits(alone, rows, trainer.data_collator, 64))
            logits[-1].append(entry.open())
    trainer.teachers = CachedTeachers(
        logits,
        names=pool.names,
        priors=pool.prior.tolist(),
        teaches=pool.teaches,
        label_names=pool.label_names,
        languages=LANGUAGES,
    )
    numbered = trainer.teachers.number_rows(splits)
    trainer.train_dataset, trainer.eval_dataset = numbered["train"], numbered["validation"]


PARTS: dict[str, Callable[[int, Watch], None]] = {"loss": run_loss, "live": run_live, "cached": run_cached}


def measure(part: str, steps: int) -> list[Sample]:
    """The samples of a part in this process."""
    watch = Watch(steps)
    PARTS[part](steps, watch)
    return watch.samples


def growth(samples: list[Sample]) -> list[str]:
    """What has grown since the warm-up, in words; empty if nothing has."""
    first, last = samples[WARM_UP - 1], samples[-1]
    found = []
    if last.rss - first.rss >= MOST_GROWTH:
        found.append(f"memory by {(last.rss - first.rss) / 1e6:.1f} MB")
    for what in ("files", "threads"):
        most = max(getattr(sample, what) for sample in samples[WARM_UP:])
        if most > getattr(first, what):
            found.append(f"{what} from {getattr(first, what)} to {most}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10_000, help="of each part (default: %(default)s)")
    args = parser.parse_args()
    print(*(f"{key}: {value}" for key, value in machine().items()), sep="\n")
    print("\n| part | step | memory, MB | open files | threads |\n| --- | --- | --- | --- | --- |", flush=True)
    grown = {}
    for part in args.parts.split(","):
        # A new process: memory that an earlier part has left would hide growth.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            samples = pool.submit(measure, part, args.steps).result()
        for sample in samples:
            print(
                f"| {part} | {sample.step:,} | {sample.rss / 1e6:.1f} | {sample.files} | {sample.threads} |", flush=True
            )
        if found := growth(samples):
            grown[part] = found
    for part, found in grown.items():
        print(f"{part} grows: {', '.join(found)}", file=sys.stderr)
    sys.exit(1 if grown else 0)


if __name__ == "__main__":
    main()
