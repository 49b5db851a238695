"""Teachers of token tasks: masked and causal language models, and token classifiers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from amtss_fast.data.targets import LANGUAGE_MODELS, TOKEN_TASKS, Targets
from amtss_fast.errors import NotFiniteError, UserError
from amtss_fast.loss.logits import QuantizedWeight
from amtss_fast.models.heads import OutputHead
from amtss_fast.teachers.contract import Answers
from amtss_fast.teachers.int8 import Int8Embedding
from amtss_fast.teachers.pool import LiveTeachers
from amtss_fast.teachers.teacher import Teacher


class TokenTeachers(LiveTeachers):
    """Several teachers of a token task beside one student; they read the student's token ids.

    A sequence goes only to the teachers of its language; a teacher without a sequence in the batch is not run.

    Args:
        teachers: K teachers (`load_teacher(..., task=task)`) with different names. Their tokenizer is the student's;
            language models may pad their vocabulary to different sizes.
        task: `"masked-lm"`, `"causal-lm"` or `"token-classification"`.
        languages: the student's languages; `language_ids` are places in it.
        tokenizer: the student's.
        label_names: the student's labels in the order of its logits; for token-classification.

    Raises:
        UserError: no teacher, a name twice, another tokenizer, labels that do not match, a head that cannot be fused,
            a language that the student lacks.
        ValueError: a task without tokens; label names for a language model, or none for token-classification.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        *,
        task: str,
        languages: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        label_names: Sequence[str] | None = None,
    ) -> None:
        if task not in TOKEN_TASKS:
            raise ValueError(f"task must be one of {', '.join(TOKEN_TASKS)}; got {task!r}")
        if (label_names is None) != (task in LANGUAGE_MODELS):
            raise ValueError(f"label_names belong to token-classification, got {label_names!r} for task {task!r}")
        super().__init__(teachers, languages, tokenizer)
        if tokenizer.padding_side != "right":
            raise UserError(f"task {task!r} needs padding on the right, set tokenizer.padding_side = 'right'")
        for teacher, differs in zip(self.teachers, self.reads_text, strict=True):
            if differs:
                raise UserError(
                    f"teacher {teacher.name!r} has another tokenizer than the student: with task {task!r} all must "
                    "read the same token ids"
                )
        self.task = task
        self.label_names = None if label_names is None else list(label_names)
        self._order: list[list[int]] = []
        if label_names is None:
            self.heads = [_head(teacher) for teacher in self.teachers]
        else:
            self._order = [teacher.align(label_names) for teacher in self.teachers]

    def ask(self, batch: Mapping[str, Any]) -> Callable[[], Answers]:
        """Runs the teachers; the returned function gives their answers for the positions that count.

        Rows are the positions of :class:`amtss_fast.data.targets.Targets`. They are computed here, in the student's
        stream.

        Args:
            batch: `input_ids`, `attention_mask` and `labels` [N, T], `language_ids` [N], and other inputs of the
                teachers' models.

        Raises:
            ValueError: labels whose shape is not that of `input_ids`.
            NotFiniteError: a teacher's output is not finite.
        """
        answers = self.outputs(batch, Targets.of(self.task, batch))
        return lambda: answers

    @torch.no_grad()
    def outputs(self, batch: Mapping[str, Any], targets: Targets) -> Answers:
        """The teachers' outputs at the positions of `targets`, on their device; 0 where a teacher does not teach.

        They are hidden states, K of [n, H_k], from language models, and logits [n, C] in the student's order of labels
        from token classifiers, both in the teacher's dtype.

        Raises:
            NotFiniteError: a teacher's output is not finite.
        """
        mask = self.teaches.to(targets.index.device)[:, batch["language_ids"]]  # [K, N]
        outputs = [self._outputs_of(k, batch, targets, taught) for k, taught in enumerate(mask)]
        return Answers(outputs, mask[:, targets.rows])

    def _outputs_of(self, k: int, batch: Mapping[str, Any], targets: Targets, taught: Tensor) -> Tensor:
        """Outputs [n, H_k] or [n, C] of teacher k, which teaches the sequences `taught` [N] bool."""
        teacher, device = self.teachers[k], targets.index.device
        sequences = taught.nonzero().squeeze(1)
        if len(sequences) == 0:
            width = len(self._order[k]) if self._order else self.heads[k].width
            return torch.zeros(len(targets.index), width, device=device)
        inputs = {
            name: value[sequences].to(teacher.device)
            for name, value in batch.items()
            if name in teacher.inputs and isinstance(value, Tensor)
        }
        here = taught[targets.rows]  # [n]
        # The place of each sequence of the batch among those that this teacher reads.
        place = taught.cumsum(0) - 1
        length = batch["input_ids"].shape[1]
        index = place[targets.rows[here]] * length + targets.index[here] % length
        values = self._forward(k, inputs).flatten(0, 1)[index.to(teacher.device)].to(device)
        if not values.isfinite().all():
            raise NotFiniteError(f"teacher {teacher.name!r} ({teacher.dtype}) gave values that are not finite")
        output = values.new_zeros(len(here), values.shape[1])
        output[here] = values
        return output

    def _forward(self, k: int, inputs: dict[str, Tensor]) -> Tensor:
        """[N, T, H_k] states or [N, T, C] logits of teacher k, in its own precision."""
        teacher = self.teachers[k]
        with torch.autocast(teacher.device.type, enabled=False):
            if self.heads:
                return self.heads[k].hidden(teacher.model, **inputs)
            logits: Tensor = teacher.model(**inputs).logits
        return logits[..., self._order[k]]


def _head(teacher: Teacher) -> OutputHead:
    """A language model's head; in 8 bits where its word embeddings are."""
    head = OutputHead(teacher.model, f"teacher {teacher.name!r}")
    embedding = teacher.model.get_input_embeddings()
    if isinstance(embedding, Int8Embedding):
        head.quantize(QuantizedWeight(embedding.weight.data, embedding.scale.data))
    return head
