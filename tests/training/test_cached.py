"""Training from cached logits gives the same student as training with the loaded teachers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import DatasetDict
from test_trainer import LANGUAGES, make_trainer
from tiny import LABELS, tiny_teacher, tiny_tokenizer

from amtss_fast.data import DistillationCollator
from amtss_fast.teachers import ROW, CachedTeachers, CacheEntry, TeacherPool, pool_logits


@pytest.mark.parametrize("format", ["float32", "codes"])
def test_training_from_the_cache_is_training_with_the_teachers(tmp_path: Path, format: str) -> None:
    folders = [tiny_teacher(tmp_path / name, seed=seed) for seed, name in enumerate(("a", "b"))]
    adaptive = {"importance_temperature": 0.1, "gap_temperature": 0.1}
    live = make_trainer(tmp_path / "live", folders, logging_steps=1, **adaptive)
    pool = live.teachers
    assert isinstance(pool, TeacherPool)
    cached = make_trainer(tmp_path / "cached", folders, logging_steps=1, **adaptive)
    splits = {"train": cached.train_dataset, "validation": cached.eval_dataset}
    parts = []
    for teacher in pool.teachers:
        alone = TeacherPool([teacher], label_names=LABELS, languages=LANGUAGES, tokenizer=tiny_tokenizer())
        parts.append([])
        for split, rows in splits.items():
            entry = CacheEntry(tmp_path, teacher.name, split, {}, len(rows), 3, format, 40)
            entry.compute(pool_logits(alone, rows, DistillationCollator(tiny_tokenizer()), 16))
            parts[-1].append(entry.open())
    cached.teachers = CachedTeachers(
        parts,
        names=pool.names,
        priors=pool.prior.tolist(),
        teaches=pool.teaches,
        label_names=LABELS,
        languages=LANGUAGES,
    )
    numbered = cached.teachers.number_rows(DatasetDict(splits))
    cached.train_dataset, cached.eval_dataset = numbered["train"], numbered["validation"]
    histories = []
    for trainer in (live, cached):
        trainer.train()
        trainer.evaluate()
        keep = ("loss", "kd", "grad_norm", "eval_loss", "teacher_weight/a/sw", "teacher_margin/b/ur")
        histories.append([[log.get(name) for name in keep] for log in trainer.state.log_history])
    state = [trainer.model.state_dict() for trainer in (live, cached)]
    if format == "float32":
        assert histories[0] == histories[1]
        assert all(torch.equal(state[0][name], state[1][name]) for name in state[0])
    else:
        losses = [[row[0] for row in history if row[0] is not None] for history in histories]
        assert losses[0] != losses[1]
        np.testing.assert_allclose(losses[0], losses[1], rtol=5e-3)
    with pytest.raises(ValueError, match=f"the batch has no '{ROW}'"):
        cached.teachers.logits({"language_ids": torch.tensor([0])})
