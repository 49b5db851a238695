"""The tasks, one object each: :class:`~amtss_fast.training.tasks.base.Task` says what it can do."""

from amtss_fast.training.tasks.base import Objective, Rows, Step, Task
from amtss_fast.training.tasks.classification import SequenceClassification
from amtss_fast.training.tasks.tokens import LanguageModel, TokenClassification

__all__ = ["Objective", "Rows", "Step", "Task", "find_task"]

_TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        SequenceClassification(),
        TokenClassification(),
        LanguageModel("masked-lm"),
        LanguageModel("causal-lm"),
    )
}


def find_task(name: str) -> Task:
    """The task of that name; ValueError if there is none."""
    if name not in _TASKS:
        raise ValueError(f"task must be one of {', '.join(_TASKS)}; got {name!r}")
    return _TASKS[name]
