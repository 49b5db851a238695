"""A training stops where a number is not finite, and says at which step, what it was, and how to go on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from amtss_fast.errors import NotFiniteError


class StopsWhenNotFinite(TrainerCallback):
    """Checks a trainer's loss, gradients, weights and logs.

    The loss and the gradient's norm are checked in each step, the weights before they are saved or evaluated, and all
    figures of a log. With fp16 the gradient's norm is not checked: its scaler skips steps whose gradients overflow.

    Args:
        trainer: its steps, arguments and checkpoints stand in the messages.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def check_loss(self, loss: Tensor, student: Tensor, model: nn.Module) -> None:
        """NotFiniteError if the loss of a batch is not finite.

        Args:
            loss: of the batch.
            student: the student's logits or states [n, *].
            model: the student.
        """
        if bool(loss.detach().isfinite().all()):
            return
        found = "the loss is not finite"
        if lost := _lost_weights(model):
            found = f"the model's weights are not finite ({lost} first)"
        elif not bool(student.detach().isfinite().all()):
            found = "the model's outputs are not finite"
        self.stop(found, self._trainer.state.global_step + 1)

    def check_gradient(self, norm: Tensor | float | None) -> None:
        """NotFiniteError if the norm of a step's gradient is not finite."""
        if norm is not None and not self._trainer.args.fp16 and not math.isfinite(norm):
            self.stop("the gradient's norm is not finite", self._trainer.state.global_step + 1)

    def check_logs(self, logs: Mapping[str, Any]) -> None:
        """NotFiniteError for a figure of a log that is not finite."""
        for name, value in logs.items():
            if isinstance(value, float) and not math.isfinite(value):
                if name == "grad_norm" and self._trainer.args.fp16:
                    continue
                self.stop(f"{name} is not finite", self._trainer.state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if control.should_save or control.should_evaluate:
            self._check_weights(model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._check_weights(model)

    def _check_weights(self, model: nn.Module) -> None:
        if lost := _lost_weights(model):
            self.stop(f"the model's weights are not finite ({lost} first)", self._trainer.state.global_step)

    def stop(self, found: str, step: int) -> NoReturn:
        """Raises NotFiniteError; `found` says what was the first that was not finite, in this step."""
        args: Any = self._trainer.args
        # Nothing is saved after a number was lost, so the last one is good.
        last = get_last_checkpoint(args.output_dir)
        kept = "no checkpoint was saved before" if last is None else f"the last good checkpoint is {last}"
        advice = (
            f"try a lower learning_rate (it is {args.learning_rate:g}), more warmup_steps, or a lower max_grad_norm "
            f"(it is {args.max_grad_norm:g})"
        )
        raise NotFiniteError(f"training stopped at step {step}: {found}; {kept}; {advice}")

    def stop_of_teacher(self, error: NotFiniteError) -> NoReturn:
        """Raises the error of a teacher with the step."""
        step = self._trainer.state.global_step + 1
        raise NotFiniteError(f"training stopped at step {step}: {error}; try precision float32") from error


def _lost_weights(model: nn.Module) -> str | None:
    """The name of the first parameter that is not finite."""
    names, zeros = [], []
    for name, parameter in model.named_parameters():
        values: Any = parameter.detach()
        # Of a sharded parameter each process checks its own part.
        values = values.to_local() if hasattr(values, "to_local") else values
        names.append(name)
        # 0 times an infinity or NaN is NaN, and so is every sum with it.
        zeros.append((values * 0).sum().float())
    # One transfer for all of them.
    finite = torch.stack([zero.to(zeros[0].device) for zero in zeros]).isfinite().tolist() if zeros else []
    return None if all(finite) else names[finite.index(False)]
