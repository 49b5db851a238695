"""Tiny students and a batch for them."""

from __future__ import annotations

from typing import Any

import torch
from tiny import LABELS, TEXTS, tiny_bert_config, tiny_tokenizer
from torch import Tensor

from amtss_fast import AMTSSForSequenceClassification

LANGUAGES = ["en", "es", "sw"]
# Row n of the batch is in language IDS[n]; the languages mix.
IDS = torch.tensor([0, 2, 1, 0, 2])


def make_student(encoder: Any = None, **options: Any) -> Any:
    """A student in eval mode whose projections differ and are no identity."""
    torch.manual_seed(0)
    values: dict[str, Any] = {"languages": LANGUAGES, "id2label": LABELS, **options}
    student: Any = AMTSSForSequenceClassification.from_encoder(encoder or tiny_bert_config(), **values)
    with torch.no_grad():
        for projection in student.projections:
            projection.weight.normal_(0, 0.3)
            projection.bias.normal_(0, 0.3)
    return student.eval()


def make_batch(texts: tuple[str, ...] = TEXTS) -> dict[str, Tensor]:
    return dict(tiny_tokenizer()(list(texts), padding=True, return_tensors="pt"))


@torch.no_grad()
def logits_of(student: Any, ids: Tensor = IDS, **batch: Tensor) -> Tensor:
    logits: Tensor = student(**(batch or make_batch()), language_ids=ids).logits
    return logits
