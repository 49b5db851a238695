"""The stock training arguments, with those that older versions of transformers have under another name."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import transformers

__all__ = ["TrainingArguments"]

_STOCK = {argument.name for argument in fields(transformers.TrainingArguments)}


@dataclass
class _Renamed(transformers.TrainingArguments):
    """For transformers < 5.10, which has `gradient_checkpointing`, and < 5.2, which has `group_by_length`."""

    activation_checkpointing: bool = field(
        default=False, metadata={"help": "Compute activations again in the backward pass, to save memory."}
    )
    train_sampling_strategy: str = field(
        default="random",
        metadata={"help": "How training rows are ordered.", "choices": ["random", "group_by_length"]},
    )

    def __post_init__(self) -> None:
        stock: Any = self
        if "activation_checkpointing" not in _STOCK:
            stock.gradient_checkpointing = stock.gradient_checkpointing or self.activation_checkpointing
        if "train_sampling_strategy" not in _STOCK:
            if self.train_sampling_strategy not in ("random", "group_by_length"):
                raise ValueError(
                    f'train_sampling_strategy must be "random" or "group_by_length" with transformers '
                    f"{transformers.__version__}, got {self.train_sampling_strategy!r}"
                )
            stock.group_by_length = stock.group_by_length or self.train_sampling_strategy == "group_by_length"
        super().__post_init__()


if TYPE_CHECKING or {"activation_checkpointing", "train_sampling_strategy"} <= _STOCK:
    from transformers import TrainingArguments
else:
    TrainingArguments = _Renamed
