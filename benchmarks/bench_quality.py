"""What each weighting of the teachers is worth, on real text, with intervals.

    python benchmarks/bench_quality.py --encoder intfloat/multilingual-e5-small             the full one
    python benchmarks/bench_quality.py --encoder PATH --designs transfer --seeds 2 --tune-seeds 1 --quick
    python benchmarks/bench_quality.py --encoder PATH --tune-only                            never looks at test
    python benchmarks/bench_quality.py --show FILE                          the tables of what --json wrote

Protocol, fixed before test was looked at:

- Texts are `cldr_topic` (15 languages, 8 topics), `cldr_pairs`, or a file of the same columns. A quarter of the
  concepts (emoji; premises of a file) is held out, in all languages, drawn by `--split`: nothing is chosen on it.
- Sentence vectors of a frozen encoder are computed once. A student is what `AMTSSForSequenceClassification` is above
  its encoder (residual projection per language, shared classifier) on principal components of an early layer; a teacher
  is a small network on a later layer. Of two texts u, v both get u, v, |u - v|, u v. All students of a design have the
  same steps, batches and start.
- Each seed draws its own calibration concepts (held-out text for weights that need it), teachers, student rows,
  labelled rows and initial weights. KD weight (cross entropy gets 1 minus it) and the other settings of a variant are
  chosen by mean accuracy over the tuning seeds, on concepts that neither student nor teachers saw; then fresh seeds are
  trained once with what was chosen, and tested once on the held-out concepts.
- Differences are paired; their intervals (95 %) come from a bootstrap over concepts and seeds, never over rows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from cases import machine
from features import sentence_vectors
from torch import Tensor, nn

from amtss_fast import AdaptiveStrategy, AMTSSStats, amtss_loss
from amtss_fast.data import load_data

TEMPERATURE = 2.0
KD_WEIGHTS = (0.3, 0.6, 0.9)
BETAS = (0.05, 0.2, 0.5)
INF = float("inf")
GROUPS = {
    "west": ["en", "fr", "es", "de", "vi", "sw", "tr"],
    "east": ["en", "de", "el", "bg", "ru", "tr"],
    "south": ["en", "ar", "ur", "hi", "th", "zh", "vi"],
}
LAYERS = (2, 3, 4, 6, 9, 12)
STUDENT_LAYER, STUDENT_SIZE = 3, 96
ROWS_PER_LANGUAGE = 16
FIRST_SEED, FIRST_TUNING_SEED = 100, 2000
LABELS_ONLY, UNIFORM = "labels only", "uniform"
NEW_LANGUAGE, NEW, NEW_ROWS = "new language", "sw", 200


@dataclass(frozen=True)
class Texts:
    """All rows: vectors [texts per row, N, len(LAYERS), H], classes, languages, concepts, and which are held out."""

    vectors: list[np.ndarray]
    labels: Tensor
    language_ids: Tensor
    concepts: np.ndarray
    held_out: np.ndarray
    languages: list[str]
    n_classes: int
    _components: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def components(self, layer: int, size: int) -> Tensor:
        """[N, size], for pairs [N, 2 size]: whitened principal components, from the rows that are not held out."""
        if (layer, size) not in self._components:
            parts = [torch.from_numpy(v[:, LAYERS.index(layer)].astype(np.float32)) for v in self.vectors]
            if len(parts) == 2:
                size //= 2
            kept = torch.from_numpy(np.flatnonzero(~self.held_out))
            fit = torch.cat([part[kept[:: 1 + len(kept) // 10000]] for part in parts])
            mean = fit.mean(0)
            _, scale, axes = torch.linalg.svd(fit - mean, full_matrices=False)
            white = [(part - mean) @ (axes[:size].T / scale[:size] * len(fit) ** 0.5) for part in parts]
            if len(white) == 2:
                u, v = white
                white, size = [u, v, (u - v).abs(), u * v], 2 * size
            self._components[layer, size] = torch.cat(white, 1)
        return self._components[layer, size]


def read_texts(data: str, encoder: str, cache: Path, split: int, only: list[str] | None = None) -> Texts:
    known = {"cldr_topic": "concept", "cldr_pairs": "pair_id"}
    rows = load_data(data, keep=(known[data],) if data in known else (), languages=only)
    table = {c: [v for part in rows.values() for v in part[c]] for c in next(iter(rows.values())).column_names}
    texts = [table[name] for name in ("text", "text_pair") if name in table]
    languages = sorted(set(table["language"]))
    unique = sorted({text for column in texts for text in column})
    vectors = sentence_vectors(unique, encoder, LAYERS, cache)
    place = {text: index for index, text in enumerate(unique)}
    if data == "cldr_pairs":
        # train-0-PREMISE-HYPOTHESIS
        names = [name.split("-")[2] for name in table["pair_id"]]
    elif data == "cldr_topic":
        names = table["concept"]
    else:
        # Parallel files have the same rows in each language, in order; three hypotheses share a premise.
        seen = dict.fromkeys(languages, 0)
        names = []
        for language in table["language"]:
            names.append(str(seen[language] // 3))
            seen[language] += 1
    concepts = np.unique(names, return_inverse=True)[1]
    held_out = np.random.default_rng(split).permutation(concepts.max() + 1)[: round(0.25 * (concepts.max() + 1))]
    return Texts(
        vectors=[vectors[[place[text] for text in column]] for column in texts],
        labels=torch.tensor(table["label"]),
        language_ids=torch.tensor([languages.index(code) for code in table["language"]]),
        concepts=concepts,
        held_out=np.isin(concepts, held_out),
        languages=languages,
        n_classes=len(next(iter(rows.values())).features["label"].names),
    )


@dataclass(frozen=True)
class Design:
    """A situation: what the teachers learned from, what the student gets, and how much of it is labelled."""

    teacher_layer: int
    teacher_size: int
    teacher_share: float = 1.0
    """Share of the concepts that teachers learn from; the student gets the others, or the same ones at 1."""
    labelled: float = 1.0
    half_classes: bool = False
    """Teachers of all languages that each saw half of the classes, cross-fitted by concept, in place of GROUPS."""
    steps: int = 360


DESIGNS = {
    "transfer": Design(teacher_layer=4, teacher_size=384, teacher_share=0.8, steps=240),
    "few labels": Design(teacher_layer=12, teacher_size=128, labelled=0.1),
    "half the classes": Design(teacher_layer=12, teacher_size=128, labelled=0.1, half_classes=True),
    "all labels": Design(teacher_layer=12, teacher_size=128),
    NEW_LANGUAGE: Design(teacher_layer=4, teacher_size=384),
}


@dataclass(frozen=True)
class Variant:
    """One way to weigh the teachers; `settings` are the values of it to choose from."""

    prior: str = "none"
    """none, single, static, routing, oracle or adaptive."""
    betas: tuple[float, ...] = (INF,)
    weighting: str = "label_margin"
    prior_temperatures: tuple[float, ...] = (1.0,)
    gap_temperatures: tuple[float | None, ...] = (None,)
    kd_weights: tuple[float, ...] = KD_WEIGHTS
    shuffle: bool = False
    smoothing: bool = False

    def settings(self) -> list[dict[str, Any]]:
        names = ("kd_weight", "beta", "prior_temperature", "gap_temperature")
        values = (self.kd_weights, self.betas, self.prior_temperatures, self.gap_temperatures)
        return [dict(zip(names, chosen, strict=True)) for chosen in itertools.product(*values)]


VARIANTS = {
    LABELS_ONLY: Variant(kd_weights=(0.0,)),
    "label smoothing": Variant(kd_weights=(0.0,), smoothing=True),
    "single best teacher": Variant("single"),
    UNIFORM: Variant(),
    **{f"row margins, beta {beta}": Variant(betas=(beta,)) for beta in BETAS},
    "hard max-margin": Variant(betas=(0.0,)),
    "static by accuracy": Variant("static", prior_temperatures=(0.03, 0.1)),
    "own-group routing": Variant("routing"),
    "adaptive importance": Variant("adaptive", prior_temperatures=(0.1, 0.2, 0.5)),
    "importance x row margins": Variant("adaptive", BETAS, prior_temperatures=(0.2,)),
    "importance by likelihood": Variant("adaptive", weighting="label_nll"),
    "likelihood of importance and row": Variant("adaptive", (1.0, 2.0), weighting="label_nll"),
    "language weights": Variant("adaptive", prior_temperatures=(INF,), gap_temperatures=(0.1, 0.3)),
    "shuffled row margins": Variant(betas=BETAS, shuffle=True),
    "oracle: teachers that are right": Variant("oracle"),
}


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


def draw(texts: Texts, design: Design, seed: int, test: bool, quick: bool) -> Situation:
    rng = np.random.default_rng(seed)
    order = rng.permutation(np.unique(texts.concepts[~texts.held_out]))
    tuning, calibration, rest = np.split(order, [int(0.15 * len(order)), int(0.25 * len(order))])
    n_teachers = round(design.teacher_share * len(rest))
    taught = rest[:n_teachers]
    learned = rest if design.teacher_share == 1 else rest[n_teachers:]

    def rows(concepts: np.ndarray) -> Tensor:
        return torch.from_numpy(np.flatnonzero(np.isin(texts.concepts, concepts)))

    student_rows, calibration_rows = rows(learned), rows(calibration)
    eval_rows = torch.from_numpy(np.flatnonzero(texts.held_out)) if test else rows(tuning)
    x = texts.components(STUDENT_LAYER, STUDENT_SIZE * len(texts.vectors))
    x_teacher = texts.components(design.teacher_layer, design.teacher_size)

    # Which rows each teacher may learn from, before concepts.
    own = torch.ones(3, len(texts.languages), dtype=torch.bool)
    if design.half_classes:
        halves = [rng.permutation(texts.n_classes)[: texts.n_classes // 2] for _ in range(3)]
        # Together they know every class.
        halves[1] = np.setdiff1d(np.arange(texts.n_classes), halves[0])
        allowed = [torch.isin(texts.labels, torch.from_numpy(half)) for half in halves]
    else:
        own = torch.tensor([[code in group for code in texts.languages] for group in GROUPS.values()])
        allowed = [codes[texts.language_ids] for codes in own]
    folds = np.array_split(rng.permutation(taught), 2) if design.half_classes else [np.array([], dtype=int)]
    teacher_logits = torch.empty(3, len(texts.labels), texts.n_classes)
    for k, mine in enumerate(allowed):
        for number, fold in enumerate(folds):
            learn = rows(np.setdiff1d(taught, fold))
            learn = learn[mine[learn]]
            teacher = train_teacher(x_teacher[learn], texts.labels[learn], texts.n_classes, seed, quick)
            asked = rows(fold) if design.half_classes else student_rows
            if number == 0:
                asked = torch.cat([asked, calibration_rows, eval_rows])
            with torch.inference_mode():
                teacher_logits[k, asked] = teacher(x_teacher[asked])
    labels = texts.labels[student_rows].clone()
    if design.labelled < 1:
        # Whole concepts are labelled, so that no label comes back in another language.
        kept = rng.permutation(learned)[: round(design.labelled * len(learned))]
        labels[torch.from_numpy(~np.isin(texts.concepts[student_rows], kept))] = -1
    return Situation(
        x[student_rows],
        labels,
        texts.labels[student_rows],
        texts.language_ids[student_rows],
        teacher_logits[:, student_rows].contiguous(),
        (teacher_logits[:, calibration_rows], texts.labels[calibration_rows], texts.language_ids[calibration_rows]),
        own,
        x[eval_rows],
        texts.labels[eval_rows],
        texts.language_ids[eval_rows],
        texts.concepts[eval_rows],
        60 if quick else design.steps,
        teacher_logits[:, eval_rows].argmax(-1) == texts.labels[eval_rows],
    )


def train_teacher(x: Tensor, labels: Tensor, n_classes: int, seed: int, quick: bool) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(x.shape[1], 128), nn.GELU(), nn.Dropout(0.3), nn.Linear(128, n_classes))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05, fused=True)
    for _ in range(1 if quick else 6):
        for rows in torch.randperm(len(x)).split(256):
            loss = F.cross_entropy(model(x[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


class Student(nn.Module):
    """`AMTSSForSequenceClassification` above its encoder, for batches [L, M, D] of M rows of each language."""

    def __init__(self, n_languages: int, size: int, n_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_languages, size, size))
        self.bias = nn.Parameter(torch.zeros(n_languages, 1, size))
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(size, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        z = x + torch.tanh(torch.baddbmm(self.bias, x, self.weight))
        logits: Tensor = self.classifier(self.dropout(z))
        return logits

    @torch.no_grad()
    def predict(self, x: Tensor, language_ids: Tensor) -> Tensor:
        """[N] classes of rows in any order."""
        classes = torch.empty(len(x), dtype=torch.long)
        for language in language_ids.unique().tolist():
            rows = language_ids == language
            z = x[rows] + torch.tanh(x[rows] @ self.weight[language] + self.bias[language])
            classes[rows] = self.classifier(z).argmax(-1)
        return classes

    def with_language(self, like: int, place: int | None) -> Student:
        """With a copy of a projection inserted at `place`, or with this one alone and the classifier frozen."""
        kept = list(range(len(self.weight)))
        kept = [like] if place is None else [*kept[:place], like, *kept[place:]]
        new = Student(len(kept), self.weight.shape[1], self.classifier.out_features)
        new.classifier.load_state_dict(self.classifier.state_dict())
        new.weight.data, new.bias.data = self.weight.data[kept].clone(), self.bias.data[kept].clone()
        return new if place is not None else new.freeze_classifier()

    def freeze_classifier(self) -> Student:
        self.classifier.requires_grad_(False)
        return self


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


def fit(
    s: Situation,
    variant: Variant,
    setting: dict[str, Any],
    seed: int,
    student: Student | None = None,
    per_language: int = ROWS_PER_LANGUAGE,
) -> tuple[Student, float]:
    """Trains a student, and says in how many of its rows the weighted mean of the teachers has the right class."""
    torch.manual_seed(seed)
    n_teachers, _, n_classes = s.teacher_logits.shape
    n_languages, labelled = s.own.shape[1], s.labels >= 0
    kd_weight: float = setting["kd_weight"]
    prior, beta = fixed_prior(s, variant, setting), setting["beta"]
    if variant.shuffle:
        # Only among rows of one language and alike labelled: what is left is chance.
        prior = statistics(s.teacher_logits, s.labels, variant.weighting, beta).weights.clone()
        kind, beta = 2 * s.language_ids + labelled, INF
        generator = torch.Generator().manual_seed(seed)
        for value in kind.unique().tolist():
            rows = (kind == value).nonzero().squeeze(1)
            prior[:, rows] = prior[:, rows[torch.randperm(len(rows), generator=generator)]]
    adaptive = AdaptiveStrategy(
        n_teachers,
        n_languages,
        importance_temperature=setting["prior_temperature"] if variant.prior == "adaptive" else None,
        gap_temperature=setting["gap_temperature"],
    )
    held_logits, held_labels, held_ids = s.calibration
    adaptive.start(statistics(held_logits, held_labels, variant.weighting).margins, held_ids)
    adaptive.step()
    smoothing = 0.0
    if variant.smoothing:
        # The gold class of the smoothed target has the mean probability that the teachers' mean gives it.
        mean = (s.teacher_logits / TEMPERATURE).softmax(-1).mean(0)[labelled]
        gold = float(mean.gather(1, s.labels[labelled].unsqueeze(1)).mean())
        smoothing = (1 - gold) * n_classes / (n_classes - 1)
    student = student or Student(n_languages, s.x.shape[1], n_classes)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 2e-3, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, s.steps)
    # Without teachers, rows without a label would be no more than idle steps.
    draws = s.language_ids if kd_weight > 0 else torch.where(labelled, s.language_ids, -1)
    for rows in batches(draws, n_languages, per_language, s.steps):
        ids = s.language_ids[rows]
        loss, stats = amtss_loss(
            student(s.x[rows].view(n_languages, per_language, -1)).flatten(0, 1),
            s.teacher_logits[:, rows],
            s.labels[rows],
            temperature=TEMPERATURE,
            weighting=variant.weighting,  # type: ignore[arg-type]
            weight_temperature=beta,
            teacher_prior=prior[:, rows] * adaptive.teacher_prior(ids),
            sample_weight=adaptive.sample_weight(ids),
            kd_weight=kd_weight,
            ce_weight=1 - kd_weight,
            label_smoothing=smoothing,
            return_stats=True,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if variant.prior == "adaptive":
            adaptive.update(stats, ids, row_mask=labelled[rows])
            adaptive.step()
    prior = prior * adaptive.teacher_prior(s.language_ids)
    weights = statistics(s.teacher_logits, s.labels, variant.weighting, beta, prior).weights
    target = ((s.teacher_logits / TEMPERATURE).softmax(-1) * weights.unsqueeze(-1)).sum(0).argmax(-1)
    return student, float((target == s.truth).float().mean())


def right_of(student: Student, s: Situation) -> np.ndarray:
    """[N] whether each row of the evaluation is right."""
    return (student.predict(s.x_eval, s.language_eval) == s.labels_eval).numpy()


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


def fixed_prior(s: Situation, variant: Variant, setting: dict[str, Any]) -> Tensor:
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


# Who is heard, settings; whether all other texts of the language are there too, without labels; whether the whole
# student is trained, on a mix of all languages.
NEW_VARIANTS: dict[str, tuple[Variant, bool, bool]] = {
    LABELS_ONLY: (Variant(kd_weights=(0.0,)), False, False),
    UNIFORM: (Variant(), False, False),
    "own teacher": (Variant("routing"), False, False),
    "row margins": (Variant(betas=(0.05, 0.2)), False, False),
    "own teacher, and unlabelled texts": (Variant("routing"), True, False),
    "importance, and unlabelled texts": (Variant("adaptive", prior_temperatures=(0.2,)), True, False),
    "own teachers, unlabelled texts, replay": (Variant("routing"), True, True),
}
FIRST_STUDENT = VARIANTS[UNIFORM].settings()[1]
NEAREST, OWN_TEACHER = "nearest projection, untrained", "its own teacher"


def new_language(
    texts: Texts, s: Situation, seed: int, quick: bool
) -> tuple[Student, int, Situation, Situation, Situation]:
    """A student of all other languages and its nearest projection; the rows of `NEW` of which `NEW_ROWS` have labels,
    these alone, and all rows of all languages with no other labels of `NEW`.
    """
    language = texts.languages.index(NEW)
    student, _ = fit(
        s.select([i for i in range(len(texts.languages)) if i != language]), VARIANTS[UNIFORM], FIRST_STUDENT, seed
    )
    rows = (s.language_ids == language).nonzero().squeeze(1)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    mix = replace(s, labels=s.labels.clone())
    mix.labels[rows[NEW_ROWS:]] = -1
    new = replace(mix.select([language]), steps=40 if quick else 200)
    few = new.rows(new.labels >= 0)
    margins = []
    with torch.no_grad():
        for weight, bias in zip(student.weight, student.bias, strict=True):
            logits = student.classifier(few.x + torch.tanh(few.x @ weight + bias))
            margins.append(float(statistics(logits.unsqueeze(0), few.labels, "label_margin").margins.mean()))
    return student, int(np.argmax(margins)), new, few, mix


Tried = dict[str, list[tuple[np.ndarray, float]]]
Settings = dict[str, list[dict[str, Any]]]


def run_seed(
    texts: Texts, name: str, tried: Settings, seed: int, test: bool, quick: bool
) -> tuple[Tried, np.ndarray, list[float]]:
    """Right answers and right targets of each setting of each variant; concepts of the answers; teachers' accuracy."""
    s = draw(texts, DESIGNS[name], seed, test, quick)
    found: Tried = {variant: [] for variant in tried}
    if name != NEW_LANGUAGE:
        for variant, places in tried.items():
            for setting in places:
                student, targets = fit(s, VARIANTS[variant], setting, seed)
                found[variant].append((right_of(student, s), targets))
        return found, s.concepts_eval, s.teacher_accuracy
    base, nearest, new, few, mix = new_language(texts, s, seed, quick)
    language = texts.languages.index(NEW)
    for variant, places in tried.items():
        if variant not in NEW_VARIANTS:
            continue
        how, unlabelled, whole = NEW_VARIANTS[variant]
        for setting in places:
            if whole:
                student, targets = fit(mix, how, setting, seed, base.with_language(nearest, language))
                right = right_of(student, mix)[(s.language_eval == language).numpy()]
            else:
                start = base.with_language(nearest, None)
                student, targets = fit(new if unlabelled else few, how, setting, seed, start, per_language=64)
                right = right_of(student, new)
            found[variant].append((right, targets))
    own = new.teacher_right[int(new.own[:, 0].int().argmax())].numpy()
    if test:
        found[NEAREST] = [(right_of(base.with_language(nearest, None), new), 0.0)]
        found[OWN_TEACHER] = [(own, 0.0)]
    return found, new.concepts_eval, [float(own.mean())]


def run_design(
    texts: Texts, name: str, tried: Settings, tune: Sequence[int], seeds: Sequence[int], quick: bool
) -> dict[str, Any]:
    """Chooses a setting of each variant on the seeds `tune`, then tests these on `seeds`."""
    started, scores = time.time(), []
    for seed in tune:
        found = run_seed(texts, name, tried, seed, False, quick)[0]
        scores.append({variant: [float(right.mean()) for right, _ in places] for variant, places in found.items()})
        print(f"  tuning seed {seed}: {time.time() - started:.0f} s", flush=True)
    tuning = {
        variant: [
            dict(setting, accuracy=float(np.mean([s[variant][place] for s in scores])))
            for place, setting in enumerate(places)
        ]
        for variant, places in tried.items()
    }
    best = {variant: int(np.argmax([place["accuracy"] for place in places])) for variant, places in tuning.items()}
    result: dict[str, Any] = {
        "chosen": {variant: tried[variant][place] for variant, place in best.items()},
        "tuning": tuning,
        "tuning_seeds": list(tune),
    }
    if not seeds:
        return result
    right: dict[str, list[np.ndarray]] = {}
    targets: dict[str, list[float]] = {}
    teachers, concepts = [], np.array([])
    for seed in seeds:
        chosen = {variant: [setting] for variant, setting in result["chosen"].items()}
        found, concepts, accuracy = run_seed(texts, name, chosen, seed, True, quick)
        teachers.append(accuracy)
        for variant, ((answers, share),) in found.items():
            right.setdefault(variant, []).append(answers)
            targets.setdefault(variant, []).append(share)
        print(f"  seed {seed}: {time.time() - started:.0f} s", flush=True)
    table = {variant: per_concept(np.stack(values), concepts) for variant, values in right.items()}
    result["test"] = {
        variant: {
            "accuracy": float(np.mean([values.mean() for values in right[variant]])),
            "targets": float(np.mean(targets[variant])),
            "per_seed": [float(values.mean()) for values in right[variant]],
            "minus_uniform": interval(table[variant], table[UNIFORM]),
            "minus_labels": interval(table[variant], table[LABELS_ONLY]),
        }
        for variant in right
    }
    return result | {
        "seeds": list(seeds),
        "held_out": [len(np.unique(concepts)), len(concepts)],
        "teachers": np.mean(teachers, 0).tolist(),
        "seconds": time.time() - started,
    }


def per_concept(right: np.ndarray, concepts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Right answers [S, G] of each seed and concept, and rows [G] of each concept."""
    names, place = np.unique(concepts, return_inverse=True)
    sums = np.stack([np.bincount(place, weights=row, minlength=len(names)) for row in right])
    return sums, np.bincount(place, minlength=len(names))


def interval(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray], draws: int = 4000
) -> dict[str, float]:
    """Difference of accuracy in points with its 95 % interval: seeds and concepts are drawn with replacement."""
    difference, rows = first[0] - second[0], first[1]
    rng = np.random.default_rng(0)
    seeds, concepts = difference.shape
    means = np.empty(draws)
    for number in range(draws):
        chosen = rng.integers(concepts, size=concepts)
        of_seed = difference[rng.integers(seeds, size=seeds)].mean(0)
        means[number] = of_seed[chosen].sum() / rows[chosen].sum()
    low, high = np.percentile(100 * means, [2.5, 97.5])
    return {"points": float(100 * difference.mean(0).sum() / rows.sum()), "low": float(low), "high": float(high)}


def show(result: dict[str, Any]) -> str:
    """The table of a design, in Markdown."""
    if "test" not in result:
        lines = ["| variant | accuracy on tuning concepts | settings |", "| --- | --- | --- |"]
        for variant, places in result["tuning"].items():
            best = max(places, key=lambda place: place["accuracy"])
            lines.append(f"| {variant} | {100 * best['accuracy']:.2f} | {settings(best)} |")
        return "\n".join(lines)

    def points(cell: dict[str, float]) -> str:
        return f"{cell['points']:+.2f} ({cell['low']:+.2f} to {cell['high']:+.2f})"

    columns = ["variant", "accuracy", "minus uniform", "minus labels only", "targets", "chosen"]
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    for variant, cell in result["test"].items():
        chosen = result["chosen"].get(variant, {})
        targets = f"{100 * cell['targets']:.1f}" if chosen.get("kd_weight") else ""
        against = [points(cell[key]) for key in ("minus_uniform", "minus_labels")]
        row = [variant, f"{100 * cell['accuracy']:.2f}", *against, targets, settings(chosen)]
        lines.append("| " + " | ".join(row) + " |")
    shown = ", ".join(f"{100 * a:.1f}" for a in result["teachers"])
    return "\n".join([*lines, f"\nTeachers, each in its own languages: {shown}."])


def settings(chosen: dict[str, Any]) -> str:
    short = {"kd_weight": "kd", "beta": "β", "prior_temperature": "T", "gap_temperature": "gap"}
    left_out = {("prior_temperature", 1.0), ("gap_temperature", None), ("beta", INF)}
    return ", ".join(f"{short[k]} {v:g}" for k, v in chosen.items() if k in short and (k, v) not in left_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", help="folder or Hub id of a multilingual encoder with 12 layers")
    parser.add_argument("--cache", type=Path, default=Path("build/features"), help="folder of its sentence vectors")
    parser.add_argument("--data", default="cldr_topic", help="cldr_topic, cldr_pairs or a file (default: %(default)s)")
    parser.add_argument("--split", type=int, default=7, help="seed that draws the held-out concepts")
    parser.add_argument("--designs", default=",".join(DESIGNS), help="default: %(default)s")
    parser.add_argument("--variants", help="with ; between them; default: all")
    parser.add_argument("--languages", help="fewer than all fifteen, to see that it runs: en,sw,tr")
    parser.add_argument("--seeds", type=int, default=8, help="fresh seeds to test (default: %(default)s)")
    parser.add_argument("--tune-seeds", type=int, default=4, help="seeds to choose settings on (default: %(default)s)")
    parser.add_argument("--tune-only", action="store_true", help="stop before test")
    parser.add_argument("--quick", action="store_true", help="a few steps each: to see that it runs")
    parser.add_argument("--json", type=Path, help="file for all figures, beside those that it has")
    parser.add_argument("--show", type=Path, help="print the tables of such a file, and do nothing else")
    options = parser.parse_args()
    if options.show:
        for name, result in json.loads(options.show.read_text(encoding="utf-8")).items():
            print(f"\n### {name}\n\n{show(result)}")
        return
    if options.encoder is None:
        parser.error("--encoder is needed")
    only = options.languages and options.languages.split(",")
    texts = read_texts(options.data, options.encoder, options.cache, options.split, only)
    seeds = range(FIRST_SEED, FIRST_SEED + (0 if options.tune_only else options.seeds))
    tune = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + options.tune_seeds)
    for name in options.designs.split(","):
        print(f"{name}:", flush=True)
        table = {n: v for n, (v, _, _) in NEW_VARIANTS.items()} if name == NEW_LANGUAGE else VARIANTS
        wanted = [n for n in table if options.variants is None or n in options.variants.split(";")]
        tried = {n: table[n].settings() for n in dict.fromkeys([LABELS_ONLY, UNIFORM, *wanted])}
        result = run_design(texts, name, tried, tune, seeds, options.quick)
        result |= {"machine": machine(), "arguments": {k: str(v) for k, v in vars(options).items() if v is not None}}
        print(show(result), flush=True)
        if options.json:
            kept = json.loads(options.json.read_text(encoding="utf-8")) if options.json.is_file() else {}
            title = name if options.data == "cldr_topic" else f"{name}, {Path(options.data).stem}"
            options.json.write_text(json.dumps(kept | {title: result}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
