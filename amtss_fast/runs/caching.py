"""The teachers' logits of a run, computed once and read in training."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from accelerate import PartialState
from transformers.utils.logging import disable_progress_bar

from amtss_fast._compat.datasets import fingerprint
from amtss_fast.errors import UserError
from amtss_fast.runs.build import find_teacher, load_teachers, taught_languages, train_teachers
from amtss_fast.runs.config import CacheConfig, RunConfig, TeacherConfig
from amtss_fast.runs.folder import RunFolder, check_folder
from amtss_fast.runs.preflight import check_run, untrained
from amtss_fast.runs.setup import Setup, prepare, student_arguments
from amtss_fast.teachers import CachedTeachers, CacheEntry, default_format, files_digest, pool_logits
from amtss_fast.teachers.int8 import choose_engine


def compute_cache(config: RunConfig) -> list[str]:
    """Computes the teachers' logits that `config.teacher_cache` lacks; a line about each teacher.

    Teachers that the run has to train first are trained, in the folder of the run.

    Raises:
        FileExistsError, UserError: as :func:`amtss_fast.runs.distil`, which continues there with `resume`; no
            `teacher_cache`.
    """
    check_folder(Path(_cache(config).path), "teacher_cache.path")
    folder = RunFolder(Path(config.output_dir))
    if any(teacher.path is None for teacher in config.teachers):
        folder.check(config, resume=True)
    setup, processes = prepare(config, resume=True), PartialState()
    trains = bool(untrained(setup))
    check_run(setup, ask_teachers=trains)
    if trains:
        # What a finished run was trained with stays as it is.
        if processes.is_main_process and not folder.is_finished:
            folder.open(config, resume=True)
        processes.wait_for_everyone()
    disable_progress_bar()
    train_teachers(setup)
    return compute_logits(setup)


def compute_logits(setup: Setup) -> list[str]:
    """Computes what the cache of a run lacks; a line about each teacher. Those that the run trains must be there."""
    return [_compute(setup, teacher) for teacher in setup.config.teachers]


def _compute(setup: Setup, teacher: TeacherConfig) -> str:
    """Computes what is missing of one teacher's logits; a line about them."""
    started, processes, cache = time.time(), PartialState(), _cache(setup.config)
    entries = cache_entries(setup, teacher)
    # One teacher at a time is in memory.
    pool = load_teachers(setup, [teacher])
    collate = setup.collator(pool.needs_text)
    computed = 0
    for split, entry in entries.items():
        rows = setup.encode(setup.data[split], keep_text=pool.needs_text)
        computed += entry.compute(
            pool_logits(pool, rows, collate, cache.batch_size),
            rank=processes.process_index,
            world_size=processes.num_processes,
        )
    processes.wait_for_everyone()
    size = sum(file.stat().st_size for entry in entries.values() for file in entry.folder.glob("*.arrow"))
    shards = sum(entry.shards for entry in entries.values())
    rows_ = sum(entry.rows for entry in entries.values())
    format_ = next(iter(entries.values())).format
    return (
        f"{teacher.name}: {rows_:,} rows of {', '.join(entries)} in {size / 1e6:,.1f} MB "
        f"({format_}), {computed} of {shards} shards computed here in {time.time() - started:.1f} s"
    )


def cached_teachers(setup: Setup) -> CachedTeachers:
    """Teachers that read the logits that :func:`compute_cache` has computed.

    Raises:
        FileNotFoundError, ValueError: logits that are missing, or belong to something else.
    """
    teachers = setup.config.teachers
    return CachedTeachers(
        [[entry.open() for entry in cache_entries(setup, teacher).values()] for teacher in teachers],
        names=[teacher.name for teacher in teachers],
        priors=[teacher.prior for teacher in teachers],
        teaches=torch.tensor([[code in _taught(setup, t) for code in setup.languages] for t in teachers]),
        label_names=setup.label_names,
        languages=setup.languages,
    )


def cache_entries(setup: Setup, teacher: TeacherConfig) -> dict[str, CacheEntry]:
    """A teacher's cached logits by split: of the training rows, and of the validation's if the trainer needs them."""
    cache, source = _cache(setup.config), find_teacher(setup, teacher)
    engine = choose_engine(teacher.engine, setup.device) if teacher.precision == "int8" else teacher.engine
    key = {
        "weights": files_digest(source),
        "tokenizer": None if teacher.tokenizer is None else files_digest(teacher.tokenizer),
        "precision": teacher.precision,
        "engine": engine,
        "compile": teacher.compile,
        "labels": setup.label_names,
        "teacher's labels": teacher.label_names,
        "languages": _taught(setup, teacher),
    }
    # The adaptive strategy starts from the teachers' margins on the validation split.
    splits = ["train"]
    if student_arguments(setup.config).is_adaptive and "validation" in setup.data:
        splits.append("validation")
    entries = {}
    for split in splits:
        rows = setup.encode(setup.data[split])
        entries[split] = CacheEntry(
            root=Path(cache.path),
            teacher=teacher.name,
            split=split,
            key={"data": fingerprint(rows), **key},
            rows=len(rows),
            classes=len(setup.label_names),
            format=cache.format or default_format(len(setup.label_names)),
            shard_rows=cache.shard_rows,
        )
    return entries


def _cache(config: RunConfig) -> CacheConfig:
    if config.teacher_cache is None:
        raise UserError("the configuration has no teacher_cache: give teacher_cache.path, a folder")
    return config.teacher_cache


def _taught(setup: Setup, teacher: TeacherConfig) -> list[str]:
    """The run's languages in which a teacher's logits are needed."""
    return taught_languages(setup, teacher) if teacher.prior > 0 else []
