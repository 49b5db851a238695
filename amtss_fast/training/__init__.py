"""Training: `arguments`, the `trainer` on `transformers.Trainer`, one object per task in `tasks`, and evaluation."""
# The guard stands before the imports that it guards.
# ruff: noqa: E402

from amtss_fast._compat.extras import need_training_extra

need_training_extra(__name__)

from amtss_fast.training.arguments import AMTSSTrainingArguments
from amtss_fast.training.evaluation import evaluate
from amtss_fast.training.metrics import classification_metrics, language_metrics, score_metrics
from amtss_fast.training.tasks import Task, find_task
from amtss_fast.training.trainer import AMTSSTrainer

__all__ = [
    "AMTSSTrainer",
    "AMTSSTrainingArguments",
    "Task",
    "classification_metrics",
    "evaluate",
    "find_task",
    "language_metrics",
    "score_metrics",
]
