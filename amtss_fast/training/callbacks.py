"""Callbacks of the trainer: the adaptive strategy's steps, the epoch of masks, and short logs on the terminal."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from amtss_fast._compat.transformers import ExportableState
from amtss_fast.errors import UserError

if TYPE_CHECKING:
    from amtss_fast.training.trainer import AMTSSTrainer


class KeepsStrategy(TrainerCallback, ExportableState):
    """Steps the adaptive strategy and the language sampler, and keeps both in `trainer_state.json`."""

    def __init__(self, trainer: AMTSSTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        adaptive, sampler = self._trainer.adaptive, self._trainer.language_sampler
        if state.global_step > 0:
            callbacks: Any = state.stateful_callbacks
            saved = callbacks.get(type(self).__name__, {}).get("attributes", {})
            for part, state_of_it, arguments in (
                ("adaptive", adaptive, "importance_temperature and gap_temperature"),
                ("sampler", sampler, "language_sampling"),
            ):
                if state_of_it is not None and part not in saved:
                    raise UserError(
                        f"the checkpoint at step {state.global_step} was saved without {arguments} (the adaptive "
                        "strategy and the sampler start with the training): resume with the arguments of its training"
                    )
            if adaptive is not None:
                # A JSON number holds every float32 and float64 exactly.
                adaptive.load_state_dict(
                    {k: torch.tensor(v, dtype=torch.float64) for k, v in saved["adaptive"].items()}
                )
            if sampler is not None:
                sampler.load_state_dict(saved["sampler"])
        elif adaptive is not None and self._trainer.eval_dataset is not None:
            self._trainer.start_adaptive()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._trainer.language_sampler is not None:
            self._trainer.language_sampler.set_epoch(int(state.epoch or 0))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._trainer.adaptive is not None:
            self._trainer.adaptive.step()

    def state(self) -> dict[str, Any]:
        adaptive, sampler = self._trainer.adaptive, self._trainer.language_sampler
        attributes: dict[str, Any] = {}
        if adaptive is not None:
            attributes["adaptive"] = {name: v.tolist() for name, v in adaptive.state_dict().items()}
        if sampler is not None:
            attributes["sampler"] = sampler.state_dict()
        return {"args": {}, "attributes": attributes}


class SetsEpoch(TrainerCallback):
    """Gives the collator the number of the epoch, from which it draws the masked tokens."""

    def __init__(self, collator: Any) -> None:
        self._collator = collator

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._collator.epoch = int(state.epoch or 0)


# Figures of single languages: printing each of them would hide the rest.
_OF_A_LANGUAGE = re.compile(r"/|(accuracy|loss|count|gap)_")


class _Short:
    """Prints logs without the figures of single languages, which TensorBoard and the log history have."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        short = {name: value for name, value in (logs or {}).items() if not _OF_A_LANGUAGE.search(name)}
        super().on_log(args, state, control, logs=short, **kwargs)  # type: ignore[misc]


class ShortProgress(_Short, ProgressCallback):
    """The progress bar of transformers with short logs."""


class ShortPrinter(_Short, PrinterCallback):
    """The printer of transformers with short logs."""
