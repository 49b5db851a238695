"""Whether a checkpoint is a teacher at all: its labels, its head, and what padding does to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PretrainedConfig

from amtss_fast.errors import UserError
from amtss_fast.models.config import AMTSSConfig
from amtss_fast.models.names import normalize_label, show_names
from amtss_fast.models.places import told_of
from amtss_fast.teachers.teacher import Teacher

# Lengths of the two rows that are tried, in words.
_SHORT, _LONG = 1, 6


_CLASSES = {
    "sequence-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
}


def check_head(config: PretrainedConfig, name: str, task: str, label_names: Sequence[str] | None) -> None:
    """Refuses a classifier whose outputs are no softmax, or whose configuration does not say what they are.

    Args:
        config: the teacher's.
        name: the teacher's, for messages.
        task: one of the two of classifiers. Their heads may have the same weights, and one would pass for the other.
        label_names: given in place of the configuration's names; then the ids of those do not matter.

    Raises:
        UserError: naming the teacher and what its configuration says.
    """
    whose = f"teacher {name!r} ({config.name_or_path})"
    made = tuple(config.architectures or ())
    others = tuple(suffix for of, suffix in _CLASSES.items() if of != task)
    if any(kind.endswith(others) for kind in made) and not any(kind.endswith(_CLASSES[task]) for kind in made):
        raise UserError(f"{whose} is a {', '.join(made)}, which is no model for task {task!r}")
    if isinstance(config, AMTSSConfig):
        return
    if config.problem_type not in (None, "single_label_classification"):
        raise UserError(
            f"{whose} has problem_type {config.problem_type!r}: its outputs are not those of one softmax over the "
            "classes, so they cannot be distilled"
        )
    names: dict[Any, Any] = dict(config.id2label or {})
    if len(names) < 2:
        raise UserError(f"{whose} has {len(names)} output (id2label {names}), which makes no classifier")
    if label_names is not None:
        return
    mend = "mend its config.json, or name its outputs in order with label_names"
    if sorted(names) != list(range(len(names))):
        raise UserError(
            f"{whose}: the ids of id2label must be 0 to {len(names) - 1}, got {sorted(names)} in {names}; {mend}"
        )
    if len({normalize_label(label) for label in names.values()}) < len(names):
        raise UserError(f"{whose}: id2label must have different names, got {show_names(names.values())}; {mend}")
    ids: dict[Any, Any] = dict(config.label2id or {})
    other = [label for index, label in names.items() if label in ids and int(ids[label]) != index]
    if other:
        raise UserError(f"{whose}: id2label {names} and label2id {ids} contradict each other; {mend}")


@torch.no_grad()
def check_padding(teacher: Teacher) -> None:
    """Runs a short text alone and beside a longer one: its logits must be the same.

    Raises:
        UserError: they are not, or the model cannot read a batch.
    """
    assert teacher.tokenizer is not None
    what = f"teacher {teacher.name!r} ({type(teacher.model).__name__})"
    texts = [" ".join(["a"] * length) for length in (_SHORT, _LONG)]
    with told_of(f"{what} cannot read a batch of two texts"):
        together, alone = _logits(teacher, texts)[0], _logits(teacher, texts[:1])[0]
    # Fewer bits round, and do so in another way for other shapes.
    if teacher.dtype is not torch.float32 or teacher.precision != "float32":
        return
    off, size = float((together - alone).abs().max()), float(alone.abs().max())
    if not off <= 1e-3 * size + 1e-4:
        raise UserError(
            f"{what} gives a text other logits beside a longer one (off by {off:.2g}): it reads its padding, so it "
            "cannot teach in batches"
        )


def _logits(teacher: Teacher, texts: list[str]) -> torch.Tensor:
    """[N, C] in float32, of the model itself: a compiled one would take long."""
    inputs = dict(teacher.tokenize(texts))
    if teacher.own_languages is not None:
        inputs["language_ids"] = torch.zeros(len(texts), dtype=torch.long)
    taken = {name: value.to(teacher.device) for name, value in inputs.items() if name in teacher.inputs}
    logits: torch.Tensor = teacher.model(**taken, return_dict=True).logits
    return logits.float()
