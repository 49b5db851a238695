"""What fewer bits change in the teachers of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from amtss_fast.errors import UserError
from amtss_fast.loss import amtss_loss
from amtss_fast.runs.build import load_teachers
from amtss_fast.runs.config import RunConfig
from amtss_fast.runs.setup import prepare, student_arguments
from amtss_fast.teachers import PRECISIONS
from amtss_fast.teachers.precision import Measurement, changes, measure


def check_teachers(
    config: RunConfig, precisions: Sequence[str] = ("bfloat16", "int8"), rows: int = 960, batch_size: int = 32
) -> list[dict[str, Any]]:
    """What fewer bits change in a run's teachers, as :func:`amtss_fast.teachers.precision.changes` gives it.

    On the first `rows` rows of the validation split (else of the training rows), in equal shares of the languages. One
    teacher at a time is in memory. Teachers that the run trains must be there.

    Raises:
        FileNotFoundError: a teacher that is not trained yet.
        UserError: an unknown precision.
    """
    unknown = [name for name in precisions if name not in PRECISIONS or name == "float32"]
    if unknown or not precisions:
        raise UserError(f"precisions must be among {', '.join(PRECISIONS[1:])}; got {', '.join(precisions)}")
    if config.task != "sequence-classification":
        raise UserError(f"teachers are compared in sequence-classification, not in task {config.task!r}")
    setup = prepare(config)
    for teacher in config.teachers:
        folder = setup.folder.teacher(teacher.name)
        if teacher.path is None and not folder.is_dir():
            raise FileNotFoundError(f"teacher {teacher.name!r} is not trained yet: no {folder}")
    disable_progress_bar()

    split = "validation" if "validation" in setup.data else "train"
    # As many rows of each language, so that small languages count.
    found = np.array(setup.data[split]["language"])
    each = -(-rows // len(setup.languages))
    chosen = np.sort(np.concatenate([np.flatnonzero(found == code)[:each] for code in setup.languages]))
    answers: dict[str, list[Measurement]] = {precision: [] for precision in ("float32", *precisions)}
    for teacher in config.teachers:
        for precision, listed in answers.items():
            engine = teacher.engine if precision == "int8" else None
            pool = load_teachers(setup, [teacher.model_copy(update={"precision": precision, "engine": engine})])
            encoded = list(setup.encode(setup.data[split], keep_text=pool.needs_text).select(chosen))
            listed.append(measure(pool, encoded, setup.collator(pool.needs_text), batch_size))
    language_ids, labels = (torch.tensor([row[name] for row in encoded]) for name in ("language_ids", "labels"))
    arguments = student_arguments(config)
    stats = {}
    for precision, listed in answers.items():
        _, stats[precision] = amtss_loss(
            torch.zeros(len(encoded), len(setup.label_names)),
            [answer.logits for answer in listed],
            labels,
            temperature=arguments.temperature,
            teacher_temperature=arguments.teacher_temperature,
            weighting=arguments.weighting,
            weight_temperature=arguments.weight_temperature,
            teacher_prior=torch.tensor([teacher.prior for teacher in config.teachers]),
            teacher_mask=torch.stack([answer.taught for answer in listed]),
            return_stats=True,
        )
    return changes([t.name for t in config.teachers], setup.languages, language_ids, answers, stats)
