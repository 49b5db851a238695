"""Students above a frozen encoder, one for each weighting of the same teachers, trained side by side.

All see the same batches, dropout and start, so they are one stack of weights [V, ...] and one computation; each is the
student that `AMTSSForSequenceClassification` would be alone, to rounding.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amtss_fast import AdaptiveStrategy, AMTSSStats, amtss_loss

TEMPERATURE = 2.0
ROWS_PER_LANGUAGE = 16
INF = float("inf")
Setting = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """One way to weigh the teachers; `settings` are the values of it to choose from."""

    prior: str = "none"
    """none, single, static, routing, oracle or adaptive."""
    betas: tuple[float, ...] = (INF,)
    weighting: str = "label_margin"
    prior_temperatures: tuple[float, ...] = (1.0,)
    gap_temperatures: tuple[float | None, ...] = (None,)
    kd_weights: tuple[float, ...] = (0.3, 0.6, 0.9)
    shuffle: bool = False
    smoothing: bool = False

    def settings(self) -> list[Setting]:
        names = ("kd_weight", "beta", "prior_temperature", "gap_temperature")
        values = (self.kd_weights, self.betas, self.prior_temperatures, self.gap_temperatures)
        return [dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*values)]


@dataclass
class Situation:
    """A design with its seed drawn: rows of the student, its teachers' logits, and what is evaluated."""

    x: Tensor
    labels: Tensor
    truth: Tensor
    language_ids: Tensor
    teacher_logits: Tensor  # [K, N, C]
    calibration: tuple[Tensor, Tensor, Tensor]  # logits [K, M, C], labels, language_ids
    own: Tensor  # [K, L] bool
    x_eval: Tensor
    labels_eval: Tensor
    language_eval: Tensor
    concepts_eval: np.ndarray
    steps: int
    teacher_right: Tensor  # [K, N] of the evaluation

    @property
    def teacher_accuracy(self) -> list[float]:
        """Of each teacher in its own languages."""
        mask = self.own[:, self.language_eval]
        return [float(r[m].float().mean()) for r, m in zip(self.teacher_right, mask, strict=True)]

    def rows(self, kept: Tensor) -> Situation:
        """Some of the student's rows."""
        return replace(
            self,
            x=self.x[kept],
            labels=self.labels[kept],
            truth=self.truth[kept],
            language_ids=self.language_ids[kept],
            teacher_logits=self.teacher_logits[:, kept].contiguous(),
        )

    def select(self, languages: list[int]) -> Situation:
        """The rows of some languages, which are numbered anew."""
        place = torch.full((self.own.shape[1],), -1)
        place[languages] = torch.arange(len(languages))
        rows, held, here = (place[i] >= 0 for i in (self.language_ids, self.calibration[2], self.language_eval))
        logits, labels, ids = self.calibration
        chosen = self.rows(rows)
        return replace(
            chosen,
            language_ids=place[chosen.language_ids],
            calibration=(logits[:, held], labels[held], place[ids[held]]),
            own=self.own[:, languages],
            x_eval=self.x_eval[here],
            labels_eval=self.labels_eval[here],
            language_eval=place[self.language_eval[here]],
            concepts_eval=self.concepts_eval[here.numpy()],
            teacher_right=self.teacher_right[:, here],
        )


class Students(nn.Module):
    """V students of L languages, for batches [L, M, D] of M rows of each language."""

    def __init__(self, n_students: int, n_languages: int, size: int, n_classes: int, dropout: float = 0.2) -> None:
        super().__init__()
        head = nn.Linear(size, n_classes)
        # The students' matrices stand side by side, so that a language is one product.
        self.weights = nn.ParameterList(torch.zeros(size, n_students * size) for _ in range(n_languages))
        self.biases = nn.ParameterList(torch.zeros(n_students * size) for _ in range(n_languages))
        self.head_weight = nn.Parameter(head.weight.detach().T.repeat(n_students, 1, 1))
        self.head_bias = nn.Parameter(head.bias.detach().repeat(n_students, 1, 1))
        self.dropout = dropout

    def project(self, x: Tensor, language: int) -> Tensor:
        """[V, M, D] of rows [M, D] of one language."""
        projected = torch.addmm(self.biases[language], x, self.weights[language]).view(len(x), -1, x.shape[-1])
        return (x.unsqueeze(1) + torch.tanh(projected)).transpose(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [V, L * M, C]."""
        kept = F.dropout(torch.ones_like(x), self.dropout, self.training)
        z = torch.cat([self.project(rows, language) * kept[language] for language, rows in enumerate(x)], 1)
        return torch.baddbmm(self.head_bias, z, self.head_weight)

    @torch.no_grad()
    def logits(self, x: Tensor, language_ids: Tensor) -> Tensor:
        """[V, N, C] of rows in any order, without dropout."""
        logits = x.new_empty(len(self.head_weight), len(x), self.head_weight.shape[-1])
        for language in language_ids.unique().tolist():
            rows = language_ids == language
            logits[:, rows] = self.project(x[rows], language) @ self.head_weight + self.head_bias
        return logits

    @torch.no_grad()
    def copies(self, n_students: int, languages: Sequence[int] | None = None) -> Students:
        """Of the first student, with the projections of these languages, one after another; default: its own."""
        kept = range(len(self.weights)) if languages is None else languages
        size, n_classes = self.head_weight.shape[1:]
        new = Students(n_students, len(kept), size, n_classes, self.dropout)
        for place, language in enumerate(kept):
            new.weights[place].copy_(self.weights[language][:, :size].repeat(1, n_students))
            new.biases[place].copy_(self.biases[language][:size].repeat(n_students))
        new.head_weight.copy_(self.head_weight[:1])
        new.head_bias.copy_(self.head_bias[:1])
        return new


def batches(language_ids: Tensor, n_languages: int, per_language: int, steps: int) -> Iterator[Tensor]:
    """Row numbers [L * M], M of each language in turn; the rows of a language come shuffled, again and again."""
    rows = [(language_ids == language).nonzero().squeeze(1) for language in range(n_languages)]
    queues = [torch.empty(0, dtype=torch.long)] * n_languages
    for _ in range(steps):
        batch = []
        for language in range(n_languages):
            while len(queues[language]) < per_language:
                queues[language] = torch.cat([queues[language], rows[language][torch.randperm(len(rows[language]))]])
            batch.append(queues[language][:per_language])
            queues[language] = queues[language][per_language:]
        yield torch.cat(batch)


def statistics(
    logits: Tensor, labels: Tensor, weighting: str, beta: float = INF, prior: Tensor | None = None
) -> AMTSSStats:
    stats: AMTSSStats = amtss_loss(
        torch.zeros_like(logits[0]),
        logits,
        labels,
        temperature=TEMPERATURE,
        weighting=weighting,  # type: ignore[arg-type]
        weight_temperature=beta,
        teacher_prior=prior,
        return_stats=True,
    )[1]
    return stats


def fixed_prior(s: Situation, variant: Variant, setting: Setting) -> Tensor:
    """[K, N] weights that no training changes."""
    logits, labels, ids = s.calibration
    right = (logits.argmax(-1) == labels).float()
    by_language = torch.ones(s.own.shape)
    if variant.prior == "single":
        by_language = F.one_hot(right.mean(1).argmax(), len(logits)).float().unsqueeze(1).expand(s.own.shape)
    elif variant.prior == "static":
        counts = F.one_hot(ids, s.own.shape[1]).float()
        by_language = (right @ counts / counts.sum(0) / setting["prior_temperature"]).softmax(0)
    elif variant.prior == "routing":
        by_language = s.own.float()
    elif variant.prior == "oracle":
        knows = (s.teacher_logits.argmax(-1) == s.truth).float()
        return torch.where(knows.sum(0) > 0, knows, 1.0)
    return by_language[:, s.language_ids]


def fixed_weights(s: Situation, variant: Variant, setting: Setting, seed: int) -> Tensor:
    """[K, N] weights of fixed prior and row margins; times the adaptive importance they are the teachers' weights."""
    prior = fixed_prior(s, variant, setting)
    weights = statistics(s.teacher_logits, s.labels, variant.weighting, setting["beta"], prior).weights
    if variant.shuffle:
        # Only among rows of one language and alike labeled: what is left is chance.
        weights, kind = weights.clone(), 2 * s.language_ids + (s.labels >= 0)
        generator = torch.Generator().manual_seed(seed)
        for value in kind.unique().tolist():
            rows = (kind == value).nonzero().squeeze(1)
            weights[:, rows] = weights[:, rows[torch.randperm(len(rows), generator=generator)]]
    return weights


def smoothing_like(s: Situation) -> float:
    """The gold class of the smoothed target has the mean probability that the teachers' mean gives it."""
    labeled, n_classes = s.labels >= 0, s.teacher_logits.shape[-1]
    mean = (s.teacher_logits / TEMPERATURE).softmax(-1).mean(0)[labeled]
    gold = float(mean.gather(1, s.labels[labeled].unsqueeze(1)).mean())
    # Teachers no better than chance would smooth the label away.
    return min(0.99, (1 - gold) * n_classes / (n_classes - 1))


def strategies(s: Situation, wanted: Sequence[tuple[Variant, Setting]]) -> list[AdaptiveStrategy]:
    """Of each student, told of the held-out text; one for all that would see the same."""
    made: dict[tuple, AdaptiveStrategy] = {}
    found = []
    held_logits, held_labels, held_ids = s.calibration
    for variant, setting in wanted:
        temperature = setting["prior_temperature"] if variant.prior == "adaptive" else None
        gap = setting["gap_temperature"]
        # The students' own margins count for the gaps alone.
        key = (variant.weighting, temperature, gap, gap and setting["kd_weight"])
        if key not in made:
            made[key] = AdaptiveStrategy(*s.own.shape, importance_temperature=temperature, gap_temperature=gap)
            made[key].start(statistics(held_logits, held_labels, variant.weighting).margins, held_ids)
            made[key].step()
        found.append(made[key])
    return found


def fit(
    s: Situation,
    wanted: Sequence[tuple[Variant, Setting]],
    seed: int,
    start: Students | None = None,
    *,
    whole: bool = True,
    per_language: int = ROWS_PER_LANGUAGE,
    dropout: float = 0.2,
) -> tuple[Students, list[float]]:
    """Trains the students from the first one of `start`, their classifier too if `whole`.

    Also says for each in how many of its rows the weighted mean of the teachers has the right class. Students that hear
    no teacher (KD weight 0) cannot be among others: their batches are of labeled rows alone.
    """
    torch.manual_seed(seed)
    n_languages, labeled = s.own.shape[1], s.labels >= 0
    silent = {setting["kd_weight"] == 0 for _, setting in wanted}
    if len(silent) > 1:
        raise ValueError("students with and without teachers have other batches: fit them one after the other")
    students = Students(len(wanted), n_languages, s.x.shape[1], s.teacher_logits.shape[-1], dropout)
    if start is not None:
        students = start.copies(len(wanted))
    students.head_weight.requires_grad_(whole)
    students.head_bias.requires_grad_(whole)
    weights = torch.stack([fixed_weights(s, variant, setting, seed) for variant, setting in wanted])  # [V, K, N]
    adaptive = strategies(s, wanted)
    # One call of the loss for all students of the same options; the row margins are in the weights already.
    groups: dict[tuple, list[int]] = {}
    for number, (variant, setting) in enumerate(wanted):
        smoothing = smoothing_like(s) if variant.smoothing else 0.0
        groups.setdefault((setting["kd_weight"], variant.weighting, smoothing), []).append(number)
    trained = [p for p in students.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 2e-3, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, s.steps)
    draws = torch.where(labeled, s.language_ids, -1) if silent == {True} else s.language_ids
    for rows in batches(draws, n_languages, per_language, s.steps):
        ids, n_rows = s.language_ids[rows], len(rows)
        logits = students(s.x[rows].view(n_languages, per_language, -1))
        prior = weights[:, :, rows]
        importance = {strategy: strategy.teacher_prior(ids) for strategy in set(adaptive)}
        row_weight = {strategy: strategy.sample_weight(ids) for strategy in importance}
        heard: dict[AdaptiveStrategy, AMTSSStats] = {}
        loss = torch.zeros(())
        for (kd_weight, weighting, smoothing), members in groups.items():
            total, stats = amtss_loss(
                logits[members].flatten(0, 1),
                s.teacher_logits[:, rows].repeat(1, len(members), 1),
                s.labels[rows].repeat(len(members)),
                temperature=TEMPERATURE,
                weighting=weighting,
                weight_temperature=INF,
                teacher_prior=torch.cat([prior[i] * importance[adaptive[i]] for i in members], 1),
                sample_weight=torch.cat([row_weight[adaptive[i]] for i in members]),
                kd_weight=kd_weight,
                ce_weight=1 - kd_weight,
                label_smoothing=smoothing,
                reduction="sum",
                return_stats=True,
            )
            loss = loss + total / n_rows
            for place, i in enumerate(members):
                part = slice(place * n_rows, (place + 1) * n_rows)
                heard.setdefault(adaptive[i], AMTSSStats(*(value[..., part] for value in stats)))
        for strategy, stats in heard.items():
            strategy.update(stats, ids, row_mask=labeled[rows])
            strategy.step()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    targets = []
    probabilities = (s.teacher_logits / TEMPERATURE).softmax(-1)
    for mine, strategy in zip(weights, adaptive, strict=True):
        shares = mine * strategy.teacher_prior(s.language_ids)
        target = (probabilities * shares.unsqueeze(-1)).sum(0).argmax(-1)
        targets.append(float((target == s.truth).float().mean()))
    return students.eval(), targets
