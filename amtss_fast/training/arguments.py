"""The arguments of a training: those of transformers, the options of the loss, and the adaptive strategy's."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, get_type_hints

from amtss_fast._compat.arguments import TrainingArguments
from amtss_fast.data import LANGUAGE_SAMPLINGS, TASKS, LanguageSampling, check_sampling
from amtss_fast.loss import LossOptions
from amtss_fast.loss.adaptive import check_adaptive_options
from amtss_fast.loss.options import OPTION_NAMES

# transformers has a label smoothing of its own; labels and the mean over rows are the trainer's.
_NO_ARGUMENTS = ("label_smoothing", "ignore_index", "unlabeled_index", "reduction")
_LOSS_ARGUMENTS = tuple(name for name in OPTION_NAMES if name not in _NO_ARGUMENTS)


def _loss_arguments() -> type:
    """A data class with the options of the loss as arguments, made from the fields of `LossOptions`."""
    kinds = get_type_hints(LossOptions)
    # HfArgumentParser reads one type per argument; a number is allowed as well.
    kinds["teacher_temperature"] = list[float] | None
    chosen = [f for f in fields(LossOptions) if f.name in _LOSS_ARGUMENTS]
    return make_dataclass(
        "LossArguments", [(f.name, kinds[f.name], field(default=f.default, metadata=f.metadata)) for f in chosen]
    )


LossArguments: Any = _loss_arguments()


@dataclass
class AMTSSTrainingArguments(LossArguments, TrainingArguments):
    """`TrainingArguments` and the options of :func:`amtss_fast.amtss_loss`, with the same names and defaults.

    `label_smoothing_factor`, which `TrainingArguments` has, smooths the cross entropy.

    Raises:
        ValueError: an option outside its range, named in the message.
    """

    task: str = field(default="sequence-classification", metadata={"help": "What the models do.", "choices": TASKS})
    chunk_rows: int | None = field(
        default=None,
        metadata={"help": "Tokens whose logits a language model's loss holds at a time. Default: by their size."},
    )
    importance_temperature: float | None = field(
        default=None,
        metadata={"help": "Prefer the teachers that are better in each language; 0.2 suits margins. Default: off."},
    )
    gap_temperature: float | None = field(
        default=None,
        metadata={"help": "Weigh languages by how far the student lags behind its teachers. Default: off."},
    )
    language_sampling: LanguageSampling | None = field(
        default=None,
        metadata={
            "help": "How languages are drawn. Default: rows are drawn without regard to their language.",
            "choices": LANGUAGE_SAMPLINGS,
        },
    )
    language_sampling_exponent: float = field(
        default=0.3, metadata={"help": 'Of language_sampling="temperature": 1 is proportional, 0 balanced.'}
    )
    loss_backend: str | None = field(
        default=None, metadata={"help": "Backend of the loss. Default: the best that runs the tensors."}
    )
    # All parameters take part in every step, some of them (a fused head) outside the model's own forward pass.
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Look for parameters without a gradient in each step of several processes."}
    )
    # Teachers may need the texts, which the student's forward does not take.
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Drop the columns that the student's forward does not take."}
    )

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task must be one of {', '.join(TASKS)}; got {self.task!r}")
        if self.chunk_rows is not None and self.chunk_rows < 1:
            raise ValueError(f"chunk_rows must be at least 1, got {self.chunk_rows}")
        if self.batch_eval_metrics or not self.eval_do_concat_batches:
            raise ValueError(
                "metrics are of all evaluated rows together: batch_eval_metrics must be False and "
                f"eval_do_concat_batches True, got {self.batch_eval_metrics} and {self.eval_do_concat_batches}"
            )
        # Made once to check them. A list is what JSON gives back.
        temperatures = self.loss_options().teacher_temperature
        self.teacher_temperature = list(temperatures) if isinstance(temperatures, tuple) else temperatures
        check_adaptive_options(self.importance_temperature, self.gap_temperature)
        if self.language_sampling is not None:
            check_sampling(self.language_sampling, self.language_sampling_exponent)
            if self.train_sampling_strategy != "random":
                raise ValueError(
                    f"language_sampling={self.language_sampling!r} draws the rows itself: it needs "
                    f'train_sampling_strategy="random", got {str(self.train_sampling_strategy)!r}'
                )
        if self.language_sampling == "adaptive" and self.gap_temperature is None:
            raise ValueError('language_sampling="adaptive" needs gap_temperature, got None')
        super().__post_init__()

    def loss_options(self) -> LossOptions:
        """The options of the loss among these arguments."""
        chosen = {name: getattr(self, name) for name in _LOSS_ARGUMENTS}
        return LossOptions(label_smoothing=self.label_smoothing_factor, **chosen)

    @property
    def is_adaptive(self) -> bool:
        """Whether a part of the adaptive strategy is on."""
        return (self.importance_temperature, self.gap_temperature) != (None, None)
