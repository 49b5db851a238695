"""What a trainer needs from its teachers, whether they are loaded models or logits read from a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from datasets import DatasetDict
from torch import Tensor

from amtss_fast.loss.logits import QuantizedLogits
from amtss_fast.models.heads import OutputHead


class Answers(NamedTuple):
    """The outputs of K teachers for the n rows of a batch.

    Rows are the texts of a batch; in token tasks they are the positions that count, in the order of
    :class:`amtss_fast.data.targets.Targets`.
    """

    outputs: Sequence[Tensor | QuantizedLogits]
    """K of [n, C] logits, classes in the student's order; from language models K of [n, H_k] hidden states, which
    `Teachers.heads` turn into logits. Rows that a teacher does not teach are 0."""
    mask: Tensor
    """[K, n] bool: teacher k teaches row n."""


class Teachers(Protocol):
    """K teachers beside one student."""

    @property
    def task(self) -> str:
        """One of :data:`amtss_fast.data.targets.TASKS`."""

    @property
    def names(self) -> list[str]:
        """The K names."""

    @property
    def languages(self) -> list[str]:
        """The student's L languages; `language_ids` are places in this list."""

    @property
    def label_names(self) -> list[str] | None:
        """The student's C labels in the order of the logits; None for language models."""

    @property
    def heads(self) -> Sequence[OutputHead]:
        """The K heads of language models; empty in other tasks."""

    @property
    def needs_text(self) -> bool:
        """Whether a batch must carry its texts, because a teacher has another tokenizer than the student."""

    @property
    def prior(self) -> Tensor:
        """[K] float32 on the CPU, `teacher_prior` of the loss."""

    @property
    def teaches(self) -> Tensor:
        """[K, L] bool on the CPU: teacher k teaches language l."""

    def __len__(self) -> int:
        """K."""

    def number_rows(self, splits: DatasetDict) -> DatasetDict:
        """Encoded splits with the columns that `ask` needs to find a row again; unchanged for loaded teachers."""

    def ask(self, batch: Mapping[str, Any]) -> Callable[[], Answers]:
        """Starts the teachers on a batch; the returned function waits for them and gives their answers.

        Answers lie on the device of the batch and may enter a loss.

        Raises:
            ValueError: a batch that lacks an entry or has a wrong one.
            NotFiniteError: an output that is not finite; from `ask` or from the returned function.
        """


def dense(output: Tensor | QuantizedLogits) -> Tensor:
    """One teacher's output as a tensor [n, C]; 8-bit codes become float32."""
    return output.dequantize() if isinstance(output, QuantizedLogits) else output
