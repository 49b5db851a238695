"""Fused multi-teacher distillation: one loss, its kernels, and a training loop around it."""

import importlib
from typing import TYPE_CHECKING, Any

from amtss_fast.loss import (
    AdaptiveStrategy,
    AMTSSLoss,
    AMTSSStats,
    LossOptions,
    QuantizedLogits,
    QuantizedWeight,
    amtss_loss,
    linear_amtss_loss,
    quantize_logits,
    quantize_weight,
)

if TYPE_CHECKING:
    from amtss_fast.models import AMTSSConfig, AMTSSForSequenceClassification
    from amtss_fast.teachers import Teacher, TeacherPool, load_teacher
    from amtss_fast.training import AMTSSTrainer, AMTSSTrainingArguments

__version__ = "0.1.0"

# The training half stands on transformers, datasets and accelerate: imported when it is first named.
_TRAINING = {
    "AMTSSConfig": "models",
    "AMTSSForSequenceClassification": "models",
    "AMTSSTrainer": "training",
    "AMTSSTrainingArguments": "training",
    "Teacher": "teachers",
    "TeacherPool": "teachers",
    "load_teacher": "teachers",
}

__all__ = [
    "AMTSSConfig",
    "AMTSSForSequenceClassification",
    "AMTSSLoss",
    "AMTSSStats",
    "AMTSSTrainer",
    "AMTSSTrainingArguments",
    "AdaptiveStrategy",
    "LossOptions",
    "QuantizedLogits",
    "QuantizedWeight",
    "Teacher",
    "TeacherPool",
    "amtss_loss",
    "linear_amtss_loss",
    "load_teacher",
    "quantize_logits",
    "quantize_weight",
]


def __getattr__(name: str) -> Any:
    if name not in _TRAINING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_TRAINING[name]}"), name)
