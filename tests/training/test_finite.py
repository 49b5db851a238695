"""A number that is not finite stops the training with its step and cause; what goes wrong in silence is said once."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import make_trainer
from tiny import tiny_teacher

from amtss_fast.errors import NotFiniteError
from amtss_fast.training.notices import Notices


@pytest.fixture(scope="module")
def teacher_folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("teachers")
    return [tiny_teacher(folder / name, seed=seed) for seed, name in enumerate(("a", "b"))]


def at_step(step: int, action: Any) -> Any:
    """An objective's `step` that acts on the model before the forward pass of one step."""

    def patched(trainer: Any) -> None:
        original, seen = trainer.objective.step, iter(range(100))

        def act(model: Any, *args: Any, **options: Any) -> Any:
            if next(seen) == step:
                action(trainer, model)
            return original(model, *args, **options)

        trainer.objective.step = act

    return patched


def lose_weights(trainer: Any, model: Any) -> None:
    with torch.no_grad():
        next(iter(model.parameters()))[0] = float("nan")


def blow_up(trainer: Any, model: Any) -> None:
    # Finite weights whose products are not.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3e38)


def lose_teacher(trainer: Any, model: Any) -> None:
    with torch.no_grad():
        next(iter(trainer.teachers.teachers[1].model.classifier.parameters())).fill_(float("inf"))


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lose_weights, r"step 3: the model's weights are not finite \(encoder\.\S+ first\)"),
        (blow_up, "step 3: the model's outputs are not finite"),
        (lose_teacher, r"step 3: teacher 'b' \(float32\) gave logits that are not finite"),
    ],
)
def test_stops_with_the_step_and_the_cause(
    tmp_path: Path, teacher_folders: list[Path], action: Any, message: str
) -> None:
    trainer = make_trainer(tmp_path, teacher_folders, save_strategy="steps", save_steps=1)
    at_step(2, action)(trainer)
    with pytest.raises(NotFiniteError, match=message) as caught:
        trainer.train()
    if action is not lose_teacher:
        assert f"the last good checkpoint is {tmp_path / 'checkpoint-2'}" in str(caught.value)
        assert "learning_rate" in str(caught.value)


def test_a_gradient_that_overflows(tmp_path: Path, teacher_folders: list[Path]) -> None:
    trainer = make_trainer(tmp_path, teacher_folders)
    weight = trainer.model.classifiers[0].weight
    weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NotFiniteError, match="step 1: the gradient's norm is not finite; no checkpoint was saved"):
        trainer.train()


def test_lost_weights_are_not_saved(tmp_path: Path, teacher_folders: list[Path]) -> None:
    trainer = make_trainer(tmp_path, teacher_folders, save_strategy="steps", save_steps=2, max_steps=2)
    optimizer_step = torch.optim.AdamW.step
    trainer.create_optimizer()

    def step(self: Any, *args: Any, **options: Any) -> Any:
        done = optimizer_step(self, *args, **options)
        if trainer.state.global_step == 1:
            self.param_groups[0]["params"][0].data.fill_(float("nan"))
        return done

    assert trainer.optimizer is not None
    trainer.optimizer.step = step.__get__(trainer.optimizer)
    with pytest.raises(NotFiniteError, match="step 2: the model's weights are not finite"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_an_evaluation_that_is_not_finite(tmp_path: Path, teacher_folders: list[Path]) -> None:
    trainer = make_trainer(tmp_path, teacher_folders)
    lose_weights(trainer, trainer.model)
    with pytest.raises(NotFiniteError, match="eval_loss is not finite"):
        trainer.evaluate()


def test_what_goes_wrong_in_silence_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    notices = Notices(["west", "east"], ["en", "sw", "ur"])
    with caplog.at_level(logging.WARNING, "amtss_fast"):
        for step in range(12):
            notices.read(
                {
                    "teacher_weight/west/en": 1.0,
                    "teacher_weight/west/sw": 0.9999,
                    "teacher_weight/east/en": 0.0,
                    "teacher_weight/east/sw": 1e-4,
                    "student_margin/en": 0.1 * step,
                    "student_margin/sw": -0.01 * step,
                    "student_margin/ur": 0.2 * step,
                },
                step,
            )
    assert [record.message.split(":")[0] for record in caplog.records] == ["step 4", "step 5"]
    assert "teacher 'east' has lost its weight: 1.0e-04 at most" in caplog.records[0].message
    assert "language 'sw' does not learn" in caplog.records[1].message
