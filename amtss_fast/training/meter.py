"""Running means of the loss's statistics between two logs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from amtss_fast.loss import AMTSSStats


class Meter:
    """Sums of the loss's statistics by teacher and language, kept on the device until they are read."""

    def __init__(self, teachers: Sequence[str], languages: Sequence[str]) -> None:
        self._teachers = teachers
        self._languages = languages
        self._sums: Tensor | None = None

    def update(self, stats: AMTSSStats, language_ids: Tensor, counts: Tensor) -> None:
        """Adds n rows; `counts` [n] bool: which of them are not ignored."""
        n_teachers = len(self._teachers)
        # Count, weighted divergence, the student's margin, then the teachers' weights and margins.
        rows = torch.cat(
            [
                counts.unsqueeze(0).to(stats.weights.dtype),
                (stats.weights * stats.kd).where(stats.weights != 0, 0.0).sum(0, keepdim=True),
                stats.student_margin.unsqueeze(0),
                stats.weights,
                stats.margins,
            ]
        )
        if self._sums is None:
            self._sums = rows.new_zeros(3 + 2 * n_teachers, len(self._languages))
        self._sums.index_add_(1, language_ids, rows)

    def read(self, accelerator: Any) -> dict[str, float]:
        """The means since the last call, over all processes."""
        if self._sums is None:
            return {}
        sums = accelerator.reduce(self._sums, "sum").double().cpu()
        self._sums = None
        counts, n_teachers = sums[0], len(self._teachers)
        logs = {"kd": float(sums[1].sum() / counts.sum().clamp(min=1))}
        means = sums / counts.clamp(min=1)
        for language, code in enumerate(self._languages):
            if counts[language] == 0:
                continue
            logs[f"student_margin/{code}"] = float(means[2, language])
            for k, name in enumerate(self._teachers):
                logs[f"teacher_weight/{name}/{code}"] = float(means[3 + k, language])
                logs[f"teacher_margin/{name}/{code}"] = float(means[3 + n_teachers + k, language])
        return logs
