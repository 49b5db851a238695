"""Scores over all rows and over each language, from what a student or a teacher predicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import EvalPrediction


def language_metrics(prediction: EvalPrediction, languages: Sequence[str]) -> dict[str, float]:
    """The metrics of a classifier of texts, as `compute_metrics` of a `Trainer`.

    `accuracy` over all labeled rows; `accuracy_CODE`, `loss_CODE` (cross entropy, nats), `count_CODE` and `gap_CODE`
    (below the best language) of each language with labeled rows; `macro_accuracy`, the mean over these languages, and
    `worst_accuracy`, the least of them.

    Args:
        prediction: logits [N, C] and `label_ids = (labels [N], language_ids [N])`.
        languages: what `language_ids` number.
    """
    logits: Any = prediction.predictions
    label_ids: Any = prediction.label_ids
    labels, language_ids = label_ids
    return classification_metrics(logits, labels, language_ids, languages)


def classification_metrics(
    logits: np.ndarray, labels: np.ndarray, language_ids: np.ndarray, languages: Sequence[str]
) -> dict[str, float]:
    """See :func:`language_metrics`; ValueError where no row has a label."""
    known = labels >= 0
    if not known.any():
        raise ValueError(f"no labeled row among {len(labels)} to evaluate on")
    logits, labels = logits[known].astype(np.float64), labels[known]
    shifted = logits - logits.max(-1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(-1)) - np.take_along_axis(shifted, labels[:, None], -1)[:, 0]
    right = logits.argmax(-1) == labels
    metrics = _metrics(np.stack([losses, right, np.ones(len(labels))], 1), language_ids[known], languages)
    # The trainer has the loss of its own batches under this name.
    del metrics["loss"]
    return metrics


def metric_names(languages: Sequence[str]) -> list[str]:
    """The names of the metrics of an evaluation on labeled rows in these languages, the trainer's `loss` included."""
    return list(score_metrics(np.ones((len(languages), 3)), np.arange(len(languages)), languages))


def score_metrics(scores: np.ndarray, language_ids: np.ndarray, languages: Sequence[str]) -> dict[str, float]:
    """The metrics of :func:`language_metrics`, and `loss`, from sums over each of N sequences.

    Args:
        scores: [N, 3] the sum of the cross entropies in nats, positions predicted right, positions with a label.
        language_ids: [N].
        languages: what `language_ids` number.

    Raises:
        ValueError: no position has a label.
    """
    if scores[:, 2].sum() == 0:
        raise ValueError(f"no label in {len(scores)} rows to evaluate on")
    return _metrics(scores, language_ids, languages)


def _metrics(scores: np.ndarray, language_ids: np.ndarray, languages: Sequence[str]) -> dict[str, float]:
    totals = np.zeros((len(languages), 3))
    np.add.at(totals, language_ids, scores.astype(np.float64))
    loss, right, count = totals.sum(0)
    metrics = {"accuracy": right / count, "loss": loss / count}
    accuracies = {}
    for code, (loss, right, count) in zip(languages, totals, strict=True):
        if count > 0:
            accuracies[code] = right / count
            metrics |= {f"accuracy_{code}": right / count, f"loss_{code}": loss / count, f"count_{code}": int(count)}
    best = max(accuracies.values())
    metrics |= {f"gap_{code}": best - accuracy for code, accuracy in accuracies.items()}
    values = list(accuracies.values())
    return metrics | {"macro_accuracy": float(np.mean(values)), "worst_accuracy": min(values)}


def by_language(metrics: dict[str, float], languages: Sequence[str]) -> dict[str, Any]:
    """Metrics as `metrics.json` keeps them: those of each language in `per_language`, and the loss over all rows."""
    per_language = {
        code: {name: metrics[f"{name}_{code}"] for name in ("accuracy", "gap", "loss", "count")}
        for code in languages
        if f"count_{code}" in metrics
    }
    total = sum(values["count"] for values in per_language.values())
    loss = sum(values["loss"] * values["count"] for values in per_language.values()) / total
    overall = {name: metrics[name] for name in ("accuracy", "macro_accuracy", "worst_accuracy")}
    return {**overall, "loss": loss, "per_language": per_language}
