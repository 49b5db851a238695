"""Predictions for texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase

from amtss_fast.errors import UserError
from amtss_fast.models.modes import eval_mode
from amtss_fast.models.names import check_texts
from amtss_fast.models.positions import max_input_tokens
from amtss_fast.models.tokenizers import embedding_rows

if TYPE_CHECKING:
    from amtss_fast.models.student import AMTSSForSequenceClassification


@dataclass(frozen=True)
class Prediction:
    """The label of one text with the highest probability, that probability, and the probability of each label."""

    label: str
    score: float
    probabilities: dict[str, float]


def check_predict_arguments(
    texts: Sequence[str], languages: str | Sequence[str], text_pairs: Sequence[str] | None, batch_size: int
) -> tuple[list[str], list[str], list[str] | None]:
    """Texts, a language for each, and second texts.

    Raises:
        TypeError: texts that are not strings.
        UserError: unequal lengths, or a batch_size below 1.
    """
    texts, pairs = check_texts(texts, text_pairs)
    codes = [languages] * len(texts) if isinstance(languages, str) else list(languages)
    if len(codes) != len(texts):
        raise UserError(f"languages must be one code or one per text ({len(texts)}), got {len(codes)}")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise UserError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
    return texts, codes, pairs


def predict(
    student: AMTSSForSequenceClassification,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    language_ids: list[int],
    text_pairs: list[str] | None,
    batch_size: int,
) -> list[Prediction]:
    """The predictions for N texts, in the order of the texts."""
    if tokenizer.pad_token_id is None:
        raise UserError("predict pads texts, and this tokenizer has no pad token: set tokenizer.pad_token")
    names = student.config.label_names
    max_length = max_input_tokens(student, tokenizer)
    ids = torch.tensor(language_ids, dtype=torch.long)
    # Texts of similar length share a batch. The longest come first: if a batch does not fit into memory, that shows
    # at once.
    lengths = [len(text) + (len(text_pairs[i]) if text_pairs else 0) for i, text in enumerate(texts)]
    order = sorted(range(len(texts)), key=lambda i: -lengths[i])
    results: dict[int, Prediction] = {}
    with eval_mode(student):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            inputs = tokenizer(
                [texts[i] for i in rows],
                [text_pairs[i] for i in rows] if text_pairs else None,
                padding=True,
                truncation=max_length is not None,
                max_length=max_length,
                return_tensors="pt",
            )
            _check_ids(student, inputs["input_ids"])
            inputs = inputs.to(student.device)
            with torch.inference_mode():
                logits = student(
                    input_ids=inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    token_type_ids=inputs.get("token_type_ids"),
                    language_ids=ids[rows].to(student.device),
                    return_dict=True,
                ).logits
            probabilities = logits.float().softmax(-1).tolist()
            results |= {i: _prediction(names, row) for i, row in zip(rows, probabilities, strict=True)}
    return [results[i] for i in range(len(texts))]


def _check_ids(student: AMTSSForSequenceClassification, input_ids: torch.Tensor) -> None:
    rows, largest = embedding_rows(student.encoder), int(input_ids.max())
    if rows is not None and largest >= rows:
        raise UserError(
            f"the tokenizer gave the id {largest}, the student's embedding table has {rows} rows: it is another "
            "model's tokenizer"
        )


def _prediction(names: list[str], probabilities: list[float]) -> Prediction:
    best = max(range(len(probabilities)), key=probabilities.__getitem__)
    return Prediction(names[best], probabilities[best], dict(zip(names, probabilities, strict=True)))
