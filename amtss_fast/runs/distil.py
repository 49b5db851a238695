"""The recipe of a run: train the teachers, distil the student, evaluate, report."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import DatasetDict
from transformers.utils.logging import disable_progress_bar

from amtss_fast._system.memory import forget_peak, peak
from amtss_fast.runs.build import load_teachers, make_trainer, new_student, teachers_in_turns, train, train_teachers
from amtss_fast.runs.caching import cached_teachers
from amtss_fast.runs.config import RunConfig
from amtss_fast.runs.fitting import fit_into_memory
from amtss_fast.runs.folder import RunFolder
from amtss_fast.runs.memory_plan import MemoryPlan
from amtss_fast.runs.preflight import check_run
from amtss_fast.runs.report import write_report
from amtss_fast.runs.results import run_metrics
from amtss_fast.runs.setup import Setup, labels_only_options, prepare, student_arguments, training_arguments
from amtss_fast.teachers import LiveTeachers, Teachers
from amtss_fast.training.evaluation import BASELINE, STUDENT


def distil(config: RunConfig, *, overwrite: bool = False, resume: bool = False) -> Path:
    """Trains the teachers that have no checkpoint, distils the student from all of them, evaluates and reports.

    Args:
        config: the configuration.
        overwrite: replaces a run that is already in the folder.
        resume: continues an interrupted run of the same configuration: finished models are kept, the one in training
            continues from its last checkpoint.

    Returns:
        The run's folder.

    Raises:
        FileExistsError: the folder is not empty, and neither `overwrite` nor `resume` is set.
        UserError: `resume` with another configuration; what is wrong with data, models, teachers or arguments.
    """
    started = time.time()
    target = RunFolder(Path(config.output_dir))
    target.check(overwrite=overwrite, resume=resume)
    # A run that is overwritten stays until the new one is complete.
    folder = target.working(overwrite=overwrite, resume=resume)
    folder.check(config, overwrite=overwrite, resume=resume)
    here = config.model_copy(update={"output_dir": str(folder.path)})
    setup, processes = prepare(here, resume=resume), PartialState()
    teachers_in_turns(setup, len(config.teachers))
    # Cached logits take the place of the teachers.
    checked = check_run(setup, ask_teachers=config.teacher_cache is None)
    if processes.is_main_process:
        folder.open(config, overwrite=overwrite, resume=resume)
        for note in checked.notes:
            print(f"Note: {note}", flush=True)
    processes.wait_for_everyone()
    # Bars for what takes long: training, evaluation, tokenizing; none for reading and writing a checkpoint.
    disable_progress_bar()

    seconds, students, plan = {}, {}, None
    train_teachers(setup)
    if config.memory is not None:
        setup, plan = fit_into_memory(setup, config.memory)
    # With a cache the student is trained before any teacher is loaded.
    teachers = checked.teachers or (load_teachers(setup) if config.teacher_cache is None else None)
    seconds["teachers"] = time.time() - started

    started_student = time.time()
    students[STUDENT], plan = _train_student(setup, teachers or cached_teachers(setup), plan)
    seconds["student"] = time.time() - started_student
    if config.labels_only:
        started_baseline = time.time()
        students[BASELINE] = _train_labels_only(setup)
        seconds["baseline"] = time.time() - started_baseline
    if processes.is_main_process:
        metrics = _metrics(setup, students, teachers or load_teachers(setup), plan, seconds, started)
        # As it was asked for, wherever it was made.
        metrics["config"]["output_dir"] = config.output_dir
        folder.write_metrics(metrics)
        write_report(folder.path)
        folder.take_place_of(target)
    processes.wait_for_everyone()
    return target.path


def _train_student(setup: Setup, teachers: Teachers, plan: MemoryPlan | None) -> tuple[Any, MemoryPlan | None]:
    """The student, trained now or before; and the plan with the peak that its training reached."""
    target = setup.folder.student
    if target.is_dir():
        return setup.task.load_model(target), plan
    model = new_student(setup)
    arguments = student_arguments(setup.config)
    if plan is not None:
        forget_peak(setup.device)
    trainer = make_trainer(setup, model, setup.student_data(), teachers, arguments, setup.languages)
    train(setup, trainer)
    # The student is kept last: a run that goes on does not train it again, and has its log and its plan.
    if plan is not None:
        plan = replace(plan, measured=peak(setup.device))
        setup.folder.write_plan(plan)
    if trainer.is_world_process_zero():
        setup.folder.write_log(trainer.state.log_history)
    setup.folder.keep_model(trainer, target)
    return model, plan


def _train_labels_only(setup: Setup) -> Any:
    """The same student on its labeled rows alone, for as many optimizer steps."""
    target = setup.folder.labels_only
    if target.is_dir():
        return setup.task.load_model(target)
    model = new_student(setup)
    data = setup.student_data()
    options = labels_only_options(setup.config, len(data["train"]))
    labeled = DatasetDict({**data, "train": setup.task.labeled_rows(data["train"])})
    arguments = training_arguments(setup.config, target.name, options)
    trainer = make_trainer(setup, model, labeled, None, arguments, setup.languages)
    train(setup, trainer)
    setup.folder.keep_model(trainer, target)
    return model


def _metrics(
    setup: Setup,
    students: Mapping[str, Any],
    teachers: LiveTeachers,
    plan: MemoryPlan | None,
    seconds: Mapping[str, float],
    started: float,
) -> dict[str, Any]:
    sizes = {teacher.name: teacher.model.num_parameters() for teacher in teachers.teachers}
    metrics = run_metrics(setup, students, teachers, sizes, plan)
    times = {**seconds, "total": time.time() - started}
    return metrics | {"seconds": {name: round(value, 1) for name, value in times.items()}}
