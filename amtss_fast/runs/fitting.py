"""From a memory budget to the plan of a run, found with its own models, teachers and longest rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from amtss_fast._compat.transformers import prepare_inputs
from amtss_fast._system.memory import give_back, peak_of, used
from amtss_fast.errors import UserError
from amtss_fast.loss.head import default_chunk_rows
from amtss_fast.runs.build import load_teachers, make_trial, new_student
from amtss_fast.runs.caching import cached_teachers
from amtss_fast.runs.config import MemoryConfig
from amtss_fast.runs.memory_plan import AS_CONFIGURED, Loading, MemoryPlan, make_plan, parse_budget
from amtss_fast.runs.setup import Setup, student_arguments, training_arguments
from amtss_fast.teachers import PRECISIONS


def fit_into_memory(setup: Setup, memory: MemoryConfig) -> tuple[Setup, MemoryPlan]:
    """The run as its budget allows it: the plan that an interrupted run has kept, or a new one, which is kept."""
    # A new plan could have another micro-batch, and a checkpoint would not continue from where it was.
    plan = setup.folder.read_plan()
    if plan is None:
        plan = _make_plan(setup, memory)
        setup.folder.write_plan(plan)
    print(plan.describe(), flush=True)
    setup = _loading_as(setup, Loading(plan.precision, plan.resident))
    training = setup.config.training | {
        "per_device_train_batch_size": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "activation_checkpointing": plan.checkpointing,
        "chunk_rows": plan.chunk_rows,
    }
    return replace(setup, config=setup.config.model_copy(update={"training": training})), plan


def _loading_as(setup: Setup, loading: Loading) -> Setup:
    """The run with its teachers loaded another way."""
    changes: dict[str, Any] = {}
    if loading.resident is not None:
        changes["teachers_resident"] = loading.resident
    if loading.precision != AS_CONFIGURED:
        precision = {"precision": loading.precision}
        changes["teachers"] = [teacher.model_copy(update=precision) for teacher in setup.config.teachers]
    return replace(setup, config=setup.config.model_copy(update=changes))


def _make_plan(setup: Setup, memory: MemoryConfig) -> MemoryPlan:
    device, arguments = setup.device, student_arguments(setup.config)
    if arguments.world_size > 1:
        raise UserError(f"memory.budget is for one process, this run has {arguments.world_size}")
    budget = parse_budget(memory.budget, device)
    chunk_rows = _chunk_rows(setup, budget)

    @contextmanager
    def loaded(loading: Loading) -> Iterator[Callable[[int, bool, int], int]]:
        tried = _loading_as(setup, loading)
        teachers = load_teachers(tried) if tried.config.teacher_cache is None else cached_teachers(tried)
        model = new_student(tried)
        if used(device) > budget:
            raise MemoryError
        yield step_prober(tried, model, teachers, chunk_rows)
        del model, teachers
        give_back()

    try:
        return make_plan(
            budget,
            arguments.per_device_train_batch_size,
            arguments.gradient_accumulation_steps,
            _loadings(setup, memory),
            loaded,
            chunk_rows,
        )
    finally:
        give_back()


def _loadings(setup: Setup, memory: MemoryConfig) -> list[Loading]:
    """Ways to load the teachers, best first: taking turns on a GPU is slower, fewer bits are approximate."""
    config = setup.config
    if config.teacher_cache is not None:
        return [Loading()]
    highest = max(PRECISIONS.index(teacher.precision) for teacher in config.teachers)
    precisions = [PRECISIONS[highest], *(PRECISIONS[1 + highest :] if memory.approximate else ())]
    turns = (
        setup.device.type == "cuda"
        and setup.task.caches_logits
        and config.teachers_resident is None
        and len(config.teachers) > 1
    )
    loadings = []
    for place, precision in enumerate(precisions):
        name = AS_CONFIGURED if place == 0 else precision
        loadings += [Loading(name), *([Loading(name, 1)] if turns and precision != "int8" else [])]
    return loadings


def _chunk_rows(setup: Setup, budget: int) -> int | None:
    """Rows of a fused head's chunk where the default would take more than a tenth of the budget; else as configured."""
    asked = student_arguments(setup.config).chunk_rows
    if not setup.task.fuses_head or asked is not None:
        return asked
    n_classes, n_teachers = len(setup.tokenizer), len(setup.config.teachers)
    most = max(16, budget // 10 // ((n_teachers + 2) * n_classes * 4))
    default = default_chunk_rows(1 << 30, n_classes, n_teachers, 4, setup.device)
    return None if most >= default else most


def step_prober(setup: Setup, model: Any, teachers: Any, chunk_rows: int | None) -> Callable[[int, bool, int], int]:
    """A function that runs a step on the longest rows and gives the bytes at its peak, the optimizer's state included.

    It takes the rows of a micro-batch, whether activations are computed again, and the micro-batches of a step.
    """
    options = setup.config.training | {"chunk_rows": chunk_rows, "report_to": "none"}
    arguments = training_arguments(setup.config, "memory", options)
    trainer = make_trial(setup, model, setup.student_data(), teachers, arguments, setup.languages)
    rows: Any = trainer.train_dataset
    lengths = np.array([len(ids) for ids in rows["input_ids"]])
    longest = np.argsort(-lengths, kind="stable")
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    # Two states of each parameter, as Adam and similar optimizers have.
    states: int = 2 * trained
    device = trainer.args.device
    model.to(device).train()

    def peak_of_step(micro_batch: int, checkpointing: bool, accumulation: int) -> int:
        batch = trainer.data_collator([rows[int(i)] for i in longest[:micro_batch]])
        inputs = prepare_inputs(trainer, batch)
        switch = model.gradient_checkpointing_enable if checkpointing else model.gradient_checkpointing_disable
        switch()

        def step() -> None:
            # The second micro-batch is computed beside the gradients of the first.
            for _ in range(min(2, accumulation)):
                with trainer.compute_loss_context_manager():
                    trainer.compute_loss(model, dict(inputs), num_items_in_batch=torch.tensor(1)).backward()

        bytes_ = peak_of(step, device) + states
        model.zero_grad(set_to_none=True)
        return bytes_

    return peak_of_step
