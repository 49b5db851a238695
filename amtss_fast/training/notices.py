"""What goes wrong in a training without an error: a teacher without weight, a language that does not learn."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np

_LOGGER = logging.getLogger("amtss_fast")

# Logs before anything is said, the weight of a teacher that no longer counts, and the margin that others must gain.
_LOGS = 5
_LEAST_WEIGHT = 1e-3
_GAIN = 0.1


class Notices:
    """Logs a warning, once per name, about

    - a teacher whose mean weight is below 0.001 in every language that it teaches, in five logs in a row;
    - a language whose student margin is not above its first value after five logs or more, while the mean over the
      languages has risen by 0.1 or more.

    Args:
        teachers, languages: their names.
    """

    def __init__(self, teachers: Sequence[str], languages: Sequence[str]) -> None:
        self._teachers = teachers
        self._languages = languages
        self._weightless = dict.fromkeys(teachers, 0)
        self._margins: dict[str, list[float]] = {code: [] for code in languages}
        self._said: set[str] = set()

    def read(self, logs: Mapping[str, float], step: int) -> None:
        """Reads a training log, as :class:`amtss_fast.training.meter.Meter` makes it."""
        for name in self._teachers:
            weights = [logs[key] for code in self._languages if (key := f"teacher_weight/{name}/{code}") in logs]
            # A language that this teacher does not teach has weight 0 in it.
            lost = bool(weights) and max(weights) < _LEAST_WEIGHT
            self._weightless[name] = self._weightless[name] + 1 if lost else 0
            if self._weightless[name] == _LOGS:
                self._say(name, f"step {step}: teacher {name!r} has lost its weight: {max(weights):.1e} at most")
        for code in self._languages:
            if (key := f"student_margin/{code}") in logs:
                self._margins[code].append(logs[key])
        gains = {code: values[-1] - values[0] for code, values in self._margins.items() if len(values) > _LOGS}
        for code, gain in gains.items():
            if gain <= 0 and np.mean(list(gains.values())) >= _GAIN:
                first, last = self._margins[code][0], self._margins[code][-1]
                self._say(
                    code,
                    f"step {step}: language {code!r} does not learn: its student margin is {last:.3f}, at first "
                    f"{first:.3f}; the mean over the languages has risen",
                )

    def _say(self, name: str, text: str) -> None:
        if name not in self._said:
            self._said.add(name)
            _LOGGER.warning(text)
