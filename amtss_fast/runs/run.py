"""One run from its configuration to its folder: data, teachers, student, evaluation, report.

RUN/config.yaml      what was asked for, in full
RUN/teachers/NAME/   teachers trained here      RUN/labels-only/   the same student without teachers
RUN/student/         the student and its tokenizer
RUN/training/NAME/   checkpoints and TensorBoard logs of each training
RUN/log.jsonl        the student's training log
RUN/memory.json      what `memory.budget` made of the training, and the peak that it reached
RUN/metrics.json     figures on the test split  RUN/report.html    all of it, with pictures
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import yaml
from accelerate import PartialState
from datasets import Dataset, DatasetDict, List
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast, set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils.logging import disable_progress_bar

from amtss_fast._system.files import write_atomically
from amtss_fast._system.memory import forget_peak, give_back, peak, peak_of, used
from amtss_fast.data.load import DistillationCollator, encode, keep_labels, load_data, split_data
from amtss_fast.loss import amtss_loss
from amtss_fast.loss.head import default_chunk_rows
from amtss_fast.models.student import AMTSSConfig, AMTSSForSequenceClassification, load_tokenizer
from amtss_fast.runs.config import CacheConfig, MemoryConfig, ModelConfig, RunConfig, TeacherConfig
from amtss_fast.runs.memory import AS_CONFIGURED, Loading, Plan, make_plan, parse_budget
from amtss_fast.runs.report import write_report
from amtss_fast.teachers.cache import ROW, CachedTeachers, CacheEntry, default_format, files_digest, pool_logits
from amtss_fast.teachers.int8 import choose_engine
from amtss_fast.teachers.precision import Answers, ask, changes
from amtss_fast.teachers.teacher import PRECISIONS, TASK_MODELS, Teacher, TeacherPool, load_teacher
from amtss_fast.training.evaluation import BASELINE, STUDENT, evaluate, evaluate_tokens
from amtss_fast.training.tasks.tokens import (
    LANGUAGE_MODELS,
    LanguageModelCollator,
    TokenTeachers,
)
from amtss_fast.training.trainer import AMTSSTrainer, AMTSSTrainingArguments

_PLAN = "memory.json"
_FILES = ("config.yaml", "log.jsonl", _PLAN, "metrics.json", "report.html")
_FOLDERS = ("teachers", "student", "labels-only", "training")


def run(config: RunConfig, *, overwrite: bool = False, resume: bool = False) -> Path:
    """Carries a run out; returns its folder.

    `resume` goes on where an interrupted run of the same configuration stopped: models that are finished are kept, the
    one in training continues from its last checkpoint.

    Raises:
        FileExistsError: the folder is not empty, and neither `overwrite` nor `resume` was asked for.
        ValueError: `resume` with another configuration; and what the data, the models and the loss find wrong.
    """
    run = open_run(config, resume=resume)
    # Wrong training arguments show before anything is written.
    for teacher in config.teachers:
        run.teacher_arguments(teacher)
    run._turns(len(config.teachers))
    state = _set_up(run, overwrite=overwrite, resume=resume)
    # Bars for what takes long: training, evaluation, tokenising; none for reading and writing a checkpoint.
    disable_progress_bar()
    run.carry_out(state)
    return run.folder


def open_run(config: RunConfig, *, resume: bool = False) -> Run:
    """The parts of a run, for scripts that train in their own way; writes nothing yet.

    `resume`: trainings go on from their last checkpoints.
    """
    return _KINDS.get(config.task, _LanguageModelRun)(config, Path(config.output_dir), resume)


def compute_cache(config: RunConfig) -> list[str]:
    """Computes the teachers' logits that `config.teacher_cache` lacks; a line about each teacher.

    Teachers that the run has to train first are trained, in the folder of the run.

    Raises:
        FileExistsError, ValueError: as :func:`run`, which goes on there with `resume`; no `teacher_cache`.
    """
    run = open_run(config, resume=True)
    run._cache  # noqa: B018
    state = _set_up(run, writes=any(teacher.path is None for teacher in config.teachers))
    disable_progress_bar()
    return run.compute_cache(state)


def check_teachers(
    config: RunConfig, precisions: Sequence[str] = ("bfloat16", "int8"), rows: int = 960, batch_size: int = 32
) -> list[dict[str, Any]]:
    """What fewer bits change in a run's teachers, as :func:`amtss_fast.teachers.precision.changes` gives it.

    On the first `rows` rows of the validation split (else of the training rows), in equal shares of the languages. One
    teacher at a time is in memory. Teachers that the run trains must be there.

    Raises:
        FileNotFoundError: a teacher that is not trained yet.
        ValueError: an unknown precision.
    """
    unknown = [name for name in precisions if name not in PRECISIONS or name == "float32"]
    if unknown or not precisions:
        raise ValueError(f"precisions must be among {', '.join(PRECISIONS[1:])}; got {', '.join(precisions)}")
    if config.task != "sequence-classification":
        raise ValueError(f"teachers are compared in sequence-classification, not in task {config.task!r}")
    run = open_run(config, resume=True)
    for teacher in config.teachers:
        folder = run.folder / "teachers" / teacher.name
        if teacher.path is None and not folder.is_dir():
            raise FileNotFoundError(f"teacher {teacher.name!r} is not trained yet: no {folder}")
    disable_progress_bar()
    return run.check_teachers(precisions, rows, batch_size)


def _set_up(run: Run, *, overwrite: bool = False, resume: bool = True, writes: bool = True) -> PartialState:
    """The processes of a distributed run, and its folder where it `writes` there; raises as :func:`run`."""
    # Training arguments that are asked for their device set up the processes.
    run._device  # noqa: B018
    state = PartialState()
    if writes and state.is_main_process:
        _prepare(run.folder, run.config, overwrite, resume)
    state.wait_for_everyone()
    return state


def _prepare(folder: Path, config: RunConfig, overwrite: bool, resume: bool) -> None:
    text = yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)
    file = folder / "config.yaml"
    if folder.is_dir() and any(folder.iterdir()):
        # Nothing that a run has not written is ever removed.
        foreign = sorted(
            p.name for p in folder.iterdir() if p.name.removesuffix(".partial") not in (*_FILES, *_FOLDERS)
        )
        if foreign or not file.is_file():
            found = f"it has {', '.join(foreign[:5])}" if foreign else "it has no config.yaml"
            raise FileExistsError(f"{folder} is not empty and holds no run ({found}): choose another output_dir")
        if not overwrite and not resume:
            raise FileExistsError(f"{folder} holds a run: choose another output_dir, --resume or --overwrite")
        if resume and file.read_text(encoding="utf-8") != text:
            raise ValueError(f"cannot resume {folder}: its config.yaml differs from this configuration")
        if overwrite:
            shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(file, text)


@dataclass
class Run:
    """A run's data, tokenizer, teachers and student, each made when it is asked for; :func:`open_run` gives one.

    Args:
        config: what was asked for.
        folder: where it keeps what it trains.
        resume: whether trainings go on from their last checkpoints.
        plan: what `memory.budget` made of the training.
    """

    config: RunConfig
    folder: Path
    resume: bool
    plan: Plan | None = None

    def carry_out(self, state: PartialState) -> None:
        started = time.time()
        seconds: dict[str, float] = {}
        students: dict[str, Any] = {}

        for teacher in self.config.teachers:
            self._source(teacher)
        if self.config.memory is not None:
            self._fit_into_memory(self.config.memory)
        # From a cache the student learns before any teacher is loaded.
        pool = self.pool() if self.config.teacher_cache is None else None
        seconds["teachers"] = time.time() - started

        started_student = time.time()
        students[STUDENT], trainer = self._train_student(pool or self.cached_teachers())
        seconds["student"] = time.time() - started_student
        if trainer is not None and state.is_main_process:
            self._write_log(trainer.state.log_history, [teacher.name for teacher in self.config.teachers])

        if self.config.labels_only:
            started_baseline = time.time()
            students[BASELINE] = self._train_labels_only()
            seconds["baseline"] = time.time() - started_baseline

        if not state.is_main_process:
            return
        metrics = self._evaluate(pool or self.pool(), students)
        seconds["total"] = time.time() - started
        metrics["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
        write_atomically(self.folder / "metrics.json", json.dumps(metrics, indent=1, ensure_ascii=False))
        write_report(self.folder)

    # Short memory.

    def _fit_into_memory(self, memory: MemoryConfig) -> None:
        """Finds a plan for the student's training, or the one that an interrupted run has kept, and changes the
        configuration to it.
        """
        if (self.folder / _PLAN).is_file():
            # A plan made anew could find another micro-batch, and a checkpoint would not go on from where it was.
            self.plan = Plan(**json.loads((self.folder / _PLAN).read_text(encoding="utf-8")))
        else:
            self.plan = self._make_plan(memory)
            self._write_plan()
        print(self.plan.describe(), flush=True)
        self._load_teachers_as(Loading(self.plan.precision, self.plan.resident))
        training = self.config.training | {
            "per_device_train_batch_size": self.plan.micro_batch,
            "gradient_accumulation_steps": self.plan.accumulation,
            "activation_checkpointing": self.plan.checkpointing,
            "chunk_rows": self.plan.chunk_rows,
        }
        self.config = self.config.model_copy(update={"training": training})

    def _write_plan(self) -> None:
        assert self.plan is not None
        write_atomically(self.folder / _PLAN, json.dumps(asdict(self.plan), indent=1) + "\n")

    def _load_teachers_as(self, loading: Loading) -> None:
        changes: dict[str, Any] = {}
        if loading.resident is not None:
            changes["teachers_resident"] = loading.resident
        if loading.precision != AS_CONFIGURED:
            precision = {"precision": loading.precision}
            changes["teachers"] = [teacher.model_copy(update=precision) for teacher in self.config.teachers]
        self.config = self.config.model_copy(update=changes)

    def _loadings(self, memory: MemoryConfig, device: torch.device) -> list[Loading]:
        """Ways to load the teachers, best first: taking turns on a GPU is slower, fewer bits are approximate."""
        if self.config.teacher_cache is not None:
            return [Loading()]
        highest = max(PRECISIONS.index(teacher.precision) for teacher in self.config.teachers)
        precisions = [PRECISIONS[highest], *(PRECISIONS[1 + highest :] if memory.approximate else ())]
        turns = (
            device.type == "cuda"
            and self.config.task == "sequence-classification"
            and self.config.teachers_resident is None
            and len(self.config.teachers) > 1
        )
        loadings = []
        for place, precision in enumerate(precisions):
            name = AS_CONFIGURED if place == 0 else precision
            loadings += [Loading(name), *([Loading(name, 1)] if turns and precision != "int8" else [])]
        return loadings

    def _make_plan(self, memory: MemoryConfig) -> Plan:
        device = self._device
        arguments = self.arguments(STUDENT, self.config.training)
        if arguments.world_size > 1:
            raise ValueError(f"memory.budget is for one process, this run has {arguments.world_size}")
        budget = parse_budget(memory.budget, device)
        chunk_rows = self._chunk_rows(budget, device)
        configured = self.config

        @contextmanager
        def teachers(loading: Loading) -> Iterator[Callable[[int, bool, int], int]]:
            self.config = configured
            self._load_teachers_as(loading)
            pool = self.cached_teachers() if self.config.teacher_cache is not None else self.pool()
            model = self.new_student()
            if used(device) > budget:
                raise MemoryError
            yield self._prober(model, pool, chunk_rows)
            del model, pool
            give_back()

        try:
            return make_plan(
                budget,
                arguments.per_device_train_batch_size,
                arguments.gradient_accumulation_steps,
                self._loadings(memory, device),
                teachers,
                chunk_rows,
            )
        finally:
            self.config = configured
            give_back()

    def _chunk_rows(self, budget: int, device: torch.device) -> int | None:
        """None but for language models whose chunk of logits would take more than a tenth of the budget."""
        return None

    def _prober(self, model: Any, pool: Any, chunk_rows: int | None) -> Callable[[int, bool, int], int]:
        """The peak of a step on the longest rows, with the optimiser's state that it will have."""
        options = self.config.training | {"chunk_rows": chunk_rows, "report_to": "none"}
        trainer = self._trainer(model, self._student_data, pool, self.arguments("memory", options), self.languages)
        rows = cast(Dataset, trainer.train_dataset)
        lengths = np.array([len(ids) for ids in rows["input_ids"]])
        longest = np.argsort(-lengths, kind="stable")
        trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        # Two states of each parameter, as Adam and its kin have.
        states: int = 2 * trained
        device = trainer.args.device
        model.to(device).train()

        def peak_of_step(micro_batch: int, checkpointing: bool, accumulation: int) -> int:
            batch = trainer.data_collator([rows[int(i)] for i in longest[:micro_batch]])
            inputs = trainer._prepare_inputs(batch)
            switch = model.gradient_checkpointing_enable if checkpointing else model.gradient_checkpointing_disable
            switch()

            def step() -> None:
                # The second micro-batch meets the gradients of the first.
                for _ in range(min(2, accumulation)):
                    with trainer.compute_loss_context_manager():
                        trainer.compute_loss(model, dict(inputs), num_items_in_batch=torch.tensor(1)).backward()

            bytes_ = peak_of(step, device) + states
            model.zero_grad(set_to_none=True)
            return bytes_

        return peak_of_step

    # What the models stand on.

    @cached_property
    def data(self) -> DatasetDict:
        """The splits, as texts; shorten them after `tokenizer`, which may be made of them, and before `encoded`."""
        return load_run_data(self.config)

    @cached_property
    def languages(self) -> list[str]:
        """The student's, in the order of `language_ids`."""
        wanted = self.config.data.languages
        return list(wanted) if wanted is not None else sorted(set(self.data["train"]["language"]))

    @property
    def label_names(self) -> list[str]:
        """The student's classes in order."""
        return list(self.data["train"].features["label"].names)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's: loaded, or made of the training texts."""
        path = self.config.tokenizer.path
        if path is None and isinstance(self.config.student.encoder, str):
            path = self.config.student.encoder
        if path is not None:
            return load_tokenizer(path)
        train = self.data["train"]
        texts = [text for column in ("text", "text_pair") if column in train.column_names for text in train[column]]
        # Lists of words are read one word at a time.
        texts = [word for text in texts for word in ([text] if isinstance(text, str) else text)]
        return train_tokenizer(texts, self.config.tokenizer.vocab_size, mask=self.config.task == "masked-lm")

    def _load(self, folder: str | Path) -> Any:
        return AMTSSForSequenceClassification.from_pretrained(folder)

    def _collator(self, keep_text: bool) -> Any:
        return DistillationCollator(self.tokenizer, keep_text=keep_text)

    def _scores(self, rows: Dataset, students: dict[str, Any], pool: Any) -> dict[str, Any]:
        return evaluate(rows, self.tokenizer, students, pool)

    def _source(self, teacher: TeacherConfig) -> str | Path:
        """Where a teacher is, trained now if it is not there yet."""
        if teacher.path is not None:
            return teacher.path
        source = self.folder / "teachers" / teacher.name
        if not source.is_dir():
            self._train_teacher(teacher, source)
        return source

    def _teacher(self, teacher: TeacherConfig, device: torch.device | str | None = None) -> Teacher:
        return load_teacher(
            self._source(teacher),
            precision=teacher.precision,
            engine=teacher.engine,
            compile=teacher.compile,
            languages=teacher.languages,
            prior=teacher.prior,
            tokenizer=teacher.tokenizer,
            device=device or self._device,
            label_names=teacher.label_names,
            name=teacher.name,
            task=self.config.task,
        )

    @property
    def _device(self) -> torch.device:
        return self.arguments(STUDENT, self.config.training).device

    def train_teachers(self) -> None:
        """Trains those without a path that are not in the run's folder yet.

        Raises FileExistsError, ValueError: as :func:`run` does with `resume`.
        """
        here = self.folder / "teachers"
        if all(teacher.path is not None or (here / teacher.name).is_dir() for teacher in self.config.teachers):
            return
        _set_up(self)
        for teacher in self.config.teachers:
            self._source(teacher)

    def pool(self, teachers: Sequence[TeacherConfig] | None = None) -> Any:
        """The teachers of the configuration, or others of its kind, loaded; those to train are trained first."""
        teachers = teachers or self.config.teachers
        turns = self._turns(len(teachers))
        return TeacherPool(
            # Those that take turns wait on the CPU.
            [self._teacher(teacher, "cpu" if turns else None) for teacher in teachers],
            label_names=self.label_names,
            languages=self.languages,
            tokenizer=self.tokenizer,
            **turns,
        )

    def _turns(self, n_teachers: int) -> dict[str, Any]:
        """What a pool has to be told where not all of its teachers may lie on the device at once.

        Raises ValueError where there is no such device.
        """
        resident = self.config.teachers_resident
        if resident is None or resident >= n_teachers:
            return {}
        if self._device.type != "cuda":
            raise ValueError(
                f"teachers_resident = {resident} is for GPUs, this run is on {self._device}: on a CPU there is nowhere "
                "to move teachers to"
            )
        return {"resident": resident, "device": self._device}

    # What fewer bits change.

    def check_teachers(self, precisions: Sequence[str], n_rows: int, batch_size: int) -> list[dict[str, Any]]:
        split = "validation" if "validation" in self.data else "train"
        # As many rows of each language, so that small languages count.
        found = np.array(self.data[split]["language"])
        each = -(-n_rows // len(self.languages))
        chosen = np.sort(np.concatenate([np.flatnonzero(found == code)[:each] for code in self.languages]))
        answers: dict[str, list[Answers]] = {precision: [] for precision in ("float32", *precisions)}
        for teacher in self.config.teachers:
            for precision, listed in answers.items():
                engine = teacher.engine if precision == "int8" else None
                pool = self.pool([teacher.model_copy(update={"precision": precision, "engine": engine})])
                rows = list(self.encoded(split, pool.needs_text).select(chosen))
                collate = DistillationCollator(self.tokenizer, keep_text=pool.needs_text)
                listed.append(ask(pool, rows, collate, batch_size))
        language_ids, labels = (torch.tensor([row[name] for row in rows]) for name in ("language_ids", "labels"))
        arguments = self.arguments(STUDENT, self.config.training)
        stats = {}
        for precision, listed in answers.items():
            _, stats[precision] = amtss_loss(
                torch.zeros(len(rows), len(self.label_names)),
                [answer.logits for answer in listed],
                labels,
                temperature=arguments.temperature,
                weighting=arguments.weighting,
                weight_temperature=arguments.weight_temperature,
                teacher_prior=torch.tensor([teacher.prior for teacher in self.config.teachers]),
                teacher_mask=torch.stack([answer.taught for answer in listed]),
                return_stats=True,
            )
        return changes([t.name for t in self.config.teachers], self.languages, language_ids, answers, stats)

    # Cached logits.

    def compute_cache(self, state: PartialState) -> list[str]:
        """Computes what is missing of the teachers' logits; a line about each of them."""
        cache = self._cache
        lines = []
        for teacher in self.config.teachers:
            started = time.time()
            entries = self._entries(teacher)
            # One teacher at a time is in memory.
            pool = self.pool([teacher])
            collate = DistillationCollator(self.tokenizer, keep_text=pool.needs_text)
            computed = 0
            for split, entry in entries.items():
                rows = self.encoded(split, pool.needs_text)
                computed += entry.compute(
                    pool_logits(pool, rows, collate, cache.batch_size),
                    rank=state.process_index,
                    world_size=state.num_processes,
                )
            state.wait_for_everyone()
            size = sum(file.stat().st_size for entry in entries.values() for file in entry.folder.glob("*.arrow"))
            shards = sum(entry.shards for entry in entries.values())
            rows_ = sum(entry.rows for entry in entries.values())
            lines.append(
                f"{teacher.name}: {rows_:,} rows of {', '.join(entries)} in {size / 1e6:,.1f} MB "
                f"({entry.format}), {computed} of {shards} shards computed here in {time.time() - started:.1f} s"
            )
        return lines

    def cached_teachers(self) -> CachedTeachers:
        """In the place of `pool`, from the logits that `compute_cache` has computed."""
        teachers = self.config.teachers
        return CachedTeachers(
            [[entry.open() for entry in self._entries(teacher).values()] for teacher in teachers],
            names=[teacher.name for teacher in teachers],
            priors=[teacher.prior for teacher in teachers],
            teaches=torch.tensor([[code in self._taught(t) for code in self.languages] for t in teachers]),
            label_names=self.label_names,
            languages=self.languages,
        )

    @property
    def _cache(self) -> CacheConfig:
        if self.config.teacher_cache is None:
            raise ValueError("the configuration has no teacher_cache: give teacher_cache.path, a folder")
        return self.config.teacher_cache

    def _taught(self, teacher: TeacherConfig) -> list[str]:
        """The run's languages in which its logits are asked for."""
        config = AutoConfig.from_pretrained(self._source(teacher), trust_remote_code=False)
        codes = teacher.languages or (config.languages if isinstance(config, AMTSSConfig) else self.languages)
        return [code for code in self.languages if code in codes and teacher.prior > 0]

    def _entries(self, teacher: TeacherConfig) -> dict[str, CacheEntry]:
        """A teacher's cached logits by split: the training rows, and the validation's if the trainer asks for them."""
        cache = self._cache
        engine = teacher.engine
        if teacher.precision == "int8":
            engine = choose_engine(engine, self._device)
        key = {
            "weights": files_digest(self._source(teacher)),
            "tokenizer": None if teacher.tokenizer is None else files_digest(teacher.tokenizer),
            "precision": teacher.precision,
            "engine": engine,
            "compile": teacher.compile,
            "labels": self.label_names,
            "teacher's labels": teacher.label_names,
            "languages": self._taught(teacher),
        }
        entries = {}
        for split in self._cached_splits:
            rows = self.encoded(split)
            entries[split] = CacheEntry(
                root=Path(cache.path),
                teacher=teacher.name,
                split=split,
                key={"data": rows._fingerprint, **key},
                rows=len(rows),
                classes=len(self.label_names),
                format=cache.format or default_format(len(self.label_names)),
                shard_rows=cache.shard_rows,
            )
        return entries

    @property
    def _cached_splits(self) -> list[str]:
        arguments = self.arguments(STUDENT, self.config.training)
        adaptive = (arguments.importance_temperature, arguments.gap_temperature) != (None, None)
        return ["train", "validation"] if adaptive and "validation" in self.data else ["train"]

    def encoded(self, split: str, keep_text: bool = False) -> Dataset:
        """A split as token ids, labels and language ids."""
        return encode(
            self.data[split],
            self.tokenizer,
            languages=self.languages,
            max_length=self.config.data.max_length,
            keep_text=keep_text,
        )

    # The three kinds of training.

    def _train_teacher(self, teacher: TeacherConfig, target: Path) -> None:
        assert teacher.model is not None
        languages = teacher.languages or self.languages
        model = self._new_model(teacher.model, languages)
        data = DatasetDict(
            {split: rows.filter(_in(languages), input_columns="language") for split, rows in self.data.items()}
        )
        self._train(model, data, None, self.teacher_arguments(teacher), target, languages)

    def _train_student(self, pool: Any) -> tuple[Any, AMTSSTrainer | None]:
        target = self.folder / STUDENT
        if target.is_dir():
            return self._load(target), None
        model = self.new_student()
        arguments = self.arguments(STUDENT, self.config.training)
        if self.plan is not None:
            forget_peak(self._device)
        trainer = self._train(model, self._student_data, pool, arguments, target, self.languages)
        if self.plan is not None:
            self.plan = replace(self.plan, measured=peak(self._device))
            self._write_plan()
        return model, trainer

    def _train_labels_only(self) -> Any:
        target = self.folder / "labels-only"
        if target.is_dir():
            return self._load(target)
        model = self.new_student()
        data = self._labelled_data
        # As many optimiser steps as the student had, on the labelled rows again and again.
        student = self.arguments(STUDENT, self.config.training)
        per_step = student.train_batch_size * student.gradient_accumulation_steps * student.world_size
        steps = int(np.ceil(len(self._student_data["train"]) / per_step) * student.num_train_epochs)
        options = {**self.config.training, "kd_weight": 0.0, "ce_weight": 1.0}
        if options.get("language_sampling") == "adaptive":
            # Without teachers nothing says which languages lag.
            options["language_sampling"] = "proportional"
        options["max_steps"] = student.max_steps if student.max_steps > 0 else steps
        self._train(model, data, None, self.arguments(target.name, options), target, self.languages)
        return model

    @property
    def _labelled_data(self) -> DatasetDict:
        data = DatasetDict(self._student_data)
        data["train"] = data["train"].filter(lambda label: label >= 0, input_columns="label")
        return data

    @cached_property
    def _student_data(self) -> DatasetDict:
        data = DatasetDict(self.data)
        data["train"] = keep_labels(data["train"], self.config.data.labelled_fraction, seed=self.config.seed)
        return data

    def _encoder(self, model: ModelConfig) -> Any:
        set_seed(self.config.seed)
        if isinstance(model.encoder, str):
            return model.encoder
        options = {"vocab_size": len(self.tokenizer), "pad_token_id": self.tokenizer.pad_token_id, **model.encoder}
        return AutoConfig.for_model(**options)

    def new_student(self) -> Any:
        """The student as it begins: the same weights at every call."""
        return self._new_model(self.config.student, self.languages)

    def _new_model(self, model: ModelConfig, languages: Sequence[str]) -> Any:
        encoder = self._encoder(model)
        return AMTSSForSequenceClassification.from_encoder(
            encoder,
            languages=languages,
            id2label=self.label_names,
            pooling=model.pooling,
            projection_activation=model.projection_activation,
            classifier=model.classifier,
            classifier_dropout=model.classifier_dropout,
        )

    def arguments(self, name: str, options: dict[str, Any]) -> AMTSSTrainingArguments:
        """The arguments of one training; its checkpoints go to a folder of its own."""
        defaults = {
            "task": self.config.task,
            "seed": self.config.seed,
            "dataloader_pin_memory": torch.cuda.is_available() and not options.get("use_cpu", False),
        }
        return AMTSSTrainingArguments(**{**defaults, **options, "output_dir": str(self.folder / "training" / name)})

    def teacher_arguments(self, teacher: TeacherConfig) -> AMTSSTrainingArguments:
        """A teacher to train learns from labels alone."""
        labels_alone = {"kd_weight": 0.0, "ce_weight": 1.0}
        return self.arguments(teacher.name, {**self.config.teacher_training, **teacher.training, **labels_alone})

    def _train(
        self,
        model: Any,
        data: DatasetDict,
        pool: Any,
        arguments: AMTSSTrainingArguments,
        target: Path,
        languages: Sequence[str],
    ) -> AMTSSTrainer:
        trainer = self._trainer(model, data, pool, arguments, languages)
        rows = f"{len(cast(Dataset, trainer.train_dataset)):,} texts in {len(languages)} languages"
        size = f"{model.num_parameters() / 1e6:.1f} M parameters"
        if trainer.is_world_process_zero():
            print(f"\nTraining {target.name}: {rows}, {size}", flush=True)
        checkpoint = get_last_checkpoint(arguments.output_dir) if self.resume else None
        trainer.train(resume_from_checkpoint=checkpoint)
        partial = target.with_name(target.name + ".partial")
        trainer.save_model(str(partial))
        if trainer.is_world_process_zero():
            os.replace(partial, target)
        trainer.accelerator.wait_for_everyone()
        return trainer

    def _trainer(
        self, model: Any, data: DatasetDict, pool: Any, arguments: AMTSSTrainingArguments, languages: Sequence[str]
    ) -> AMTSSTrainer:
        keep_text = pool is not None and pool.needs_text
        encoded = encode(
            data,
            self.tokenizer,
            languages=languages,
            max_length=self.config.data.max_length,
            keep_text=keep_text,
        )
        if isinstance(pool, CachedTeachers):
            start = 0
            for split in self._cached_splits:
                numbers = np.arange(start, start + len(encoded[split]))
                encoded[split] = encoded[split].add_column(ROW, numbers)
                start += len(numbers)
        return AMTSSTrainer(
            model,
            arguments,
            teachers=pool,
            languages=languages,
            train_dataset=encoded["train"],
            eval_dataset=encoded.get("validation"),
            data_collator=self._collator(keep_text),
            processing_class=self.tokenizer,
        )

    # What it was worth.

    def _evaluate(self, pool: Any, students: dict[str, Any]) -> dict[str, Any]:
        split = "test" if "test" in self.data else "validation"
        if split not in self.data:
            raise ValueError(
                f"nothing to evaluate on: the data has the splits {list(self.data)}, no test or validation"
            )
        rows = encode(
            self.data[split],
            self.tokenizer,
            languages=self.languages,
            max_length=self.config.data.max_length,
            keep_text=pool.needs_text,
        )
        results = self._scores(rows, students, pool)
        return {
            "task": self.config.title or self.config.task,
            "languages": self.languages,
            "label_names": self.label_names,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": {
                name: version(name) for name in ("amtss-fast", "torch", "transformers", "datasets", "accelerate")
            },
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {_device_name()}",
            "split": split,
            "test": results,
            "teacher_languages": {
                name: [code for code, taught in zip(self.languages, row, strict=True) if taught]
                for name, row in zip(pool.names, pool.teaches.tolist(), strict=True)
            },
            "sizes": {
                **{name: model.num_parameters() for name, model in students.items()},
                **{teacher.name: teacher.model.num_parameters() for teacher in pool.teachers},
            },
            **({} if self.plan is None else {"memory": asdict(self.plan)}),
            "config": self.config.model_dump(),
        }

    def _write_log(self, history: list[dict[str, Any]], teachers: Sequence[str]) -> None:
        lines = [json.dumps(nest(entry), ensure_ascii=False) for entry in history]
        write_atomically(self.folder / "log.jsonl", "\n".join(lines) + "\n")


class _TokenRun(Run):
    """A run whose models answer at each token: classifiers of tokens."""

    @property
    def label_names(self) -> list[str]:
        label = self.data["train"].features["label"]
        if not isinstance(label, List):
            raise ValueError(
                "task 'token-classification' needs lists of words and of their labels, the data has one label per "
                "text; name the columns with data.text and data.label"
            )
        return list(label.feature.names)

    def pool(self, teachers: Sequence[TeacherConfig] | None = None) -> TokenTeachers:
        return TokenTeachers(
            [self._teacher(teacher) for teacher in teachers or self.config.teachers],
            task=self.config.task,
            languages=self.languages,
            tokenizer=self.tokenizer,
            # A language model has none.
            label_names=self.label_names or None,
        )

    @property
    def _labels(self) -> dict[str, Any]:
        """What a model's configuration says about its outputs."""
        names = self.label_names
        return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}

    def _load(self, folder: str | Path) -> PreTrainedModel:
        model, info = TASK_MODELS[self.config.task].from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        if info["missing_keys"] or info["mismatched_keys"]:
            raise ValueError(f"{folder} lacks weights of a {type(model).__name__}: {sorted(info['missing_keys'])}")
        return cast(PreTrainedModel, model)

    def _new_model(self, model: ModelConfig, languages: Sequence[str]) -> PreTrainedModel:
        encoder = self._encoder(model)
        kind = TASK_MODELS[self.config.task]
        if isinstance(encoder, str):
            # A pretrained encoder gets a new classifier.
            pretrained: PreTrainedModel = kind.from_pretrained(
                encoder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, **self._labels
            )
            return pretrained
        for name, value in self._labels.items():
            setattr(encoder, name, value)
        fresh: PreTrainedModel = kind.from_config(encoder)
        return fresh

    @property
    def _labelled_data(self) -> DatasetDict:
        data = DatasetDict(self._student_data)
        data["train"] = data["train"].filter(lambda labels: max(labels) >= 0, input_columns="label")
        return data

    def _scores(self, rows: Dataset, students: dict[str, Any], pool: Any) -> dict[str, Any]:
        return evaluate_tokens(rows, self._collator(False), students, self.config.task, self.languages, pool)


class _LanguageModelRun(_TokenRun):
    """A run of masked or causal language models: every text teaches, and accuracy is that of predicted tokens."""

    @property
    def label_names(self) -> list[str]:
        return []

    def _new_model(self, model: ModelConfig, languages: Sequence[str]) -> PreTrainedModel:
        encoder = self._encoder(model)
        if isinstance(encoder, str):
            return self._load(encoder)
        fresh: PreTrainedModel = TASK_MODELS[self.config.task].from_config(encoder)
        return fresh

    def _chunk_rows(self, budget: int, device: torch.device) -> int | None:
        asked: int | None = self.arguments(STUDENT, self.config.training).chunk_rows
        row_bytes = (len(self.config.teachers) + 2) * len(self.tokenizer) * 4
        most = max(16, budget // 10 // row_bytes)
        default = default_chunk_rows(1 << 30, len(self.tokenizer), len(self.config.teachers), 4, device)
        return asked if asked is not None or most >= default else most

    @property
    def _student_data(self) -> DatasetDict:
        return self.data

    @property
    def _labelled_data(self) -> DatasetDict:
        return self.data

    def _collator(self, keep_text: bool) -> LanguageModelCollator:
        return LanguageModelCollator(
            self.tokenizer,
            self.config.task,
            mask_probability=self.config.data.mask_probability,
            seed=self.config.seed,
        )


_KINDS: dict[str, type[Run]] = {"sequence-classification": Run, "token-classification": _TokenRun}


def load_run_data(config: RunConfig) -> DatasetDict:
    """The data of a configuration, with a validation split of its own where it asks for one."""
    options = config.data.model_dump(exclude={"validation_fraction", "labelled_fraction", "max_length"})
    if options["revision"] is None:
        del options["revision"]
    del options["mask_probability"]
    if config.task in LANGUAGE_MODELS and options["label"] is None:
        # A table without labels wants names for them, which nobody looks at.
        options["label_names"] = ["text"]
    data = load_data(options.pop("name"), **options)
    if config.data.validation_fraction and "validation" not in data:
        parts = split_data(data["train"], validation=config.data.validation_fraction, test=0, seed=config.seed)
        data = DatasetDict({**data, **parts})
    return data


def train_tokenizer(texts: Sequence[str], vocab_size: int, mask: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of these texts: [CLS] text [SEP], or [CLS] text [SEP] text_pair [SEP].

    `mask`: with a token [MASK].
    """
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(["[MASK]"] if mask else [])]
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]" if mask else None,
        model_input_names=["input_ids", "attention_mask"],
    )


def nest(entry: dict[str, Any]) -> dict[str, Any]:
    """A log entry with its slashed names as mappings: `teacher_weight/NAME/en` becomes `{"teacher_weight": ...}`."""
    nested: dict[str, Any] = {}
    for name, value in entry.items():
        *parents, last = name.split("/")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return nested


def _in(languages: Sequence[str]) -> Any:
    wanted = set(languages)
    return lambda language: language in wanted


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
