"""Fused multi-teacher distillation: one loss, its kernels, and a training loop around it."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amtss_fast.loss import (
        AdaptiveStrategy,
        AMTSSLoss,
        AMTSSStats,
        LossOptions,
        QuantizedLogits,
        QuantizedWeight,
        TopKLogprobs,
        amtss_loss,
        linear_amtss_loss,
        quantize_logits,
        quantize_weight,
    )
    from amtss_fast.models import AMTSSConfig, AMTSSForSequenceClassification
    from amtss_fast.teachers import Teacher, TeacherPool, load_teacher
    from amtss_fast.training import AMTSSTrainer, AMTSSTrainingArguments

__version__ = "0.1.0"

# The room of each name, imported when it is first used: the loss needs torch, the others transformers, datasets and
# accelerate. The command line sets what torch reads when it is loaded.
_ROOMS = {
    "AMTSSConfig": "models",
    "AMTSSForSequenceClassification": "models",
    "AMTSSLoss": "loss",
    "AMTSSStats": "loss",
    "AMTSSTrainer": "training",
    "AMTSSTrainingArguments": "training",
    "AdaptiveStrategy": "loss",
    "LossOptions": "loss",
    "QuantizedLogits": "loss",
    "QuantizedWeight": "loss",
    "Teacher": "teachers",
    "TeacherPool": "teachers",
    "TopKLogprobs": "loss",
    "amtss_loss": "loss",
    "linear_amtss_loss": "loss",
    "load_teacher": "teachers",
    "quantize_logits": "loss",
    "quantize_weight": "loss",
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
    "TopKLogprobs",
    "amtss_loss",
    "linear_amtss_loss",
    "load_teacher",
    "quantize_logits",
    "quantize_weight",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value
