"""What each weighting of the teachers is worth, on real text, with intervals.

    python benchmarks/bench_quality.py --encoder intfloat/multilingual-e5-small             the full one
    python benchmarks/bench_quality.py --encoder PATH --designs transfer --seeds 2 --tune-seeds 1 --quick
    python benchmarks/bench_quality.py --encoder PATH --tune-only                            never looks at test

Protocol, fixed before test was looked at:

- Texts are `cldr_topic` (15 languages, 8 topics). Its concepts (emoji) of the splits validation and test are held out:
  nothing is chosen on them. All else happens among the concepts of the training split.
- Sentence vectors of a frozen encoder are computed once. A student is what `AMTSSForSequenceClassification` is above
  its encoder (residual projection per language, shared classifier) on principal components of an early layer; a teacher
  is a small network on a later layer. All students of a design have the same steps, batches and start.
- Each seed draws its own calibration concepts (held-out text for weights that need it), teachers, student rows,
  labelled rows and initial weights. KD weight (cross entropy gets 1 minus it) and the other settings of a variant are
  chosen by mean accuracy over the tuning seeds, on concepts of the training split that neither student nor teachers
  saw; then fresh seeds are trained once with what was chosen, and tested once on the held-out concepts.
- Differences are paired; their intervals (95 %) come from a bootstrap over concepts and seeds, never over rows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from cases import machine
from features import sentence_vectors
from torch import Tensor, nn

from amtss_fast import AdaptiveStrategy, amtss_loss
from amtss_fast.data import load_data

TEMPERATURE = 2.0
KD_WEIGHTS = (0.3, 0.6, 0.9)
BETAS = (0.05, 0.2, 0.5)
GROUPS = {
    "west": ["en", "fr", "es", "de", "vi", "sw", "tr"],
    "east": ["en", "de", "el", "bg", "ru", "tr"],
    "south": ["en", "ar", "ur", "hi", "th", "zh", "vi"],
}
LAYERS = (2, 3, 4, 6, 9, 12)
STUDENT_LAYER, STUDENT_SIZE = 3, 96
ROWS_PER_LANGUAGE = 16
LABELS_ONLY, UNIFORM = "labels only", "uniform"
NEW_LANGUAGE = "new language"


@dataclass(frozen=True)
class Texts:
    """All rows: vectors [N, len(LAYERS), H], classes, languages, concepts, and which may be tuned on."""

    vectors: np.ndarray
    labels: Tensor
    language_ids: Tensor
    concepts: np.ndarray
    held_out: np.ndarray
    languages: list[str]
    n_classes: int

    def components(self, layer: int, size: int) -> Tensor:
        """[N, size]: whitened principal components of a layer, from the rows that are not held out."""
        x = torch.from_numpy(self.vectors[:, LAYERS.index(layer)].astype(np.float32))
        fit = x[torch.from_numpy(~self.held_out)][::3]
        mean = fit.mean(0)
        _, scale, axes = torch.linalg.svd(fit - mean, full_matrices=False)
        white: Tensor = (x - mean) @ (axes[:size].T / scale[:size] * len(fit) ** 0.5)
        return white


def read_texts(encoder: str, cache: Path, only: list[str] | None = None) -> Texts:
    data = load_data("cldr_topic", keep=("concept",), languages=only)
    columns = {name: [v for part in data.values() for v in part[name]] for name in ("text", "language", "concept")}
    unique = sorted(set(columns["text"]))
    vectors = sentence_vectors(unique, encoder, LAYERS, cache)
    place = {text: index for index, text in enumerate(unique)}
    languages = sorted(set(columns["language"]))
    return Texts(
        vectors=vectors[[place[text] for text in columns["text"]]],
        labels=torch.tensor([y for part in data.values() for y in part["label"]]),
        language_ids=torch.tensor([languages.index(code) for code in columns["language"]]),
        concepts=np.unique(columns["concept"], return_inverse=True)[1],
        held_out=np.array([split != "train" for split, part in data.items() for _ in range(len(part))]),
        languages=languages,
        n_classes=len(data["train"].features["label"].names),
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

    def everything(self) -> Design:
        """With all concepts for teachers and student."""
        return replace(self, teacher_share=1.0, steps=360)


DESIGNS = {
    "transfer": Design(teacher_layer=4, teacher_size=384, teacher_share=0.8, steps=240),
    "few labels": Design(teacher_layer=12, teacher_size=128, labelled=0.1),
    "all labels": Design(teacher_layer=12, teacher_size=128),
    "half the classes": Design(teacher_layer=12, teacher_size=128, labelled=0.1, half_classes=True),
}


@dataclass(frozen=True)
class Variant:
    """One way to weigh the teachers; `settings` are the values of it to choose from."""

    prior: str = "none"
    """none, single, static, routing or adaptive."""
    betas: tuple[float, ...] = (float("inf"),)
    weighting: str = "label_margin"
    prior_temperatures: tuple[float, ...] = (1.0,)
    gap_temperatures: tuple[float | None, ...] = (None,)
    kd_weights: tuple[float, ...] = KD_WEIGHTS
    labelled_margins_only: bool = False
    """Rows without a label get no weight from margins."""
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
    "adaptive importance": Variant("adaptive", prior_temperatures=(0.05, 0.15)),
    "importance x row margins": Variant("adaptive", BETAS, prior_temperatures=(0.05, 0.15)),
    "importance x labelled margins": Variant(
        "adaptive", BETAS, prior_temperatures=(0.05, 0.15), labelled_margins_only=True
    ),
    "labelled margins": Variant(betas=BETAS, labelled_margins_only=True),
    "language weights": Variant("adaptive", prior_temperatures=(float("inf"),), gap_temperatures=(0.1, 0.3)),
    "shuffled row margins": Variant(betas=BETAS, shuffle=True),
}


@dataclass
class Situation:
    """A design with its seed drawn: rows of the student, its teachers' logits, and what is evaluated."""

    x: Tensor
    labels: Tensor
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

    def own_teacher(self, language: int) -> Tensor:
        """Whether the first teacher of the language is right, in its rows."""
        first = int(self.own[:, language].int().argmax())
        return self.teacher_right[first, self.language_eval == language]


def draw(texts: Texts, design: Design, seed: int, test: bool, quick: bool) -> Situation:
    rng = np.random.default_rng(seed)
    order = rng.permutation(np.unique(texts.concepts[~texts.held_out]))
    n_tuning, n_calibration = int(0.15 * len(order)), int(0.1 * len(order))
    tuning, calibration, rest = np.split(order, [n_tuning, n_tuning + n_calibration])
    n_teachers = round(design.teacher_share * len(rest))
    taught = rest[:n_teachers]
    learned = rest if design.teacher_share == 1 else rest[n_teachers:]

    def rows(concepts: np.ndarray) -> Tensor:
        return torch.from_numpy(np.flatnonzero(np.isin(texts.concepts, concepts)))

    student_rows, calibration_rows = rows(learned), rows(calibration)
    eval_rows = torch.from_numpy(np.flatnonzero(texts.held_out)) if test else rows(tuning)
    x = components(texts, STUDENT_LAYER, STUDENT_SIZE)
    x_teacher = components(texts, design.teacher_layer, design.teacher_size)

    # Which rows each teacher may learn from, before concepts.
    if design.half_classes:
        halves = [rng.permutation(texts.n_classes)[: texts.n_classes // 2] for _ in range(3)]
        # Together they know every class.
        halves[1] = np.setdiff1d(np.arange(texts.n_classes), halves[0])
        allowed = [torch.isin(texts.labels, torch.from_numpy(half)) for half in halves]
        own = torch.ones(3, len(texts.languages), dtype=torch.bool)
    else:
        own = torch.tensor([[code in group for code in texts.languages] for group in GROUPS.values()])
        allowed = [codes[texts.language_ids] for codes in own]
    folds = np.array_split(rng.permutation(taught), 2) if design.half_classes else [np.array([], dtype=int)]
    others = torch.cat([calibration_rows, eval_rows])
    teacher_logits = torch.empty(3, len(texts.labels), texts.n_classes)
    for k, mine in enumerate(allowed):
        for number, fold in enumerate(folds):
            learn = rows(np.setdiff1d(taught, fold))
            learn = learn[mine[learn]]
            teacher = train_teacher(x_teacher[learn], texts.labels[learn], texts.n_classes, seed, quick)
            asked = rows(fold) if design.half_classes else student_rows
            if number == 0:
                asked = torch.cat([asked, others])
            with torch.inference_mode():
                teacher_logits[k, asked] = teacher(x_teacher[asked])
    labels = texts.labels[student_rows].clone()
    if design.labelled < 1:
        # Whole concepts are labelled, so that no label comes back in another language.
        kept = rng.permutation(learned)[: round(design.labelled * len(learned))]
        labels[torch.from_numpy(~np.isin(texts.concepts[student_rows], kept))] = -1
    right = teacher_logits[:, eval_rows].argmax(-1) == texts.labels[eval_rows]
    return Situation(
        x[student_rows],
        labels,
        texts.language_ids[student_rows],
        teacher_logits[:, student_rows].contiguous(),
        (teacher_logits[:, calibration_rows], texts.labels[calibration_rows], texts.language_ids[calibration_rows]),
        own,
        x[eval_rows],
        texts.labels[eval_rows],
        texts.language_ids[eval_rows],
        texts.concepts[eval_rows],
        60 if quick else design.steps,
        right,
    )


_COMPONENTS: dict[tuple[int, int], Tensor] = {}


def components(texts: Texts, layer: int, size: int) -> Tensor:
    if (layer, size) not in _COMPONENTS:
        _COMPONENTS[layer, size] = texts.components(layer, size)
    return _COMPONENTS[layer, size]


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
        self.eval()
        classes = torch.empty(len(x), dtype=torch.long)
        for language in language_ids.unique().tolist():
            rows = language_ids == language
            z = x[rows] + torch.tanh(x[rows] @ self.weight[language] + self.bias[language])
            classes[rows] = self.classifier(z).argmax(-1)
        return classes


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


def train_student(s: Situation, variant: Variant, setting: dict[str, Any], seed: int) -> np.ndarray:
    """Trains one student; returns [N] whether each row of the evaluation is right."""
    student = fit(s, variant, setting, seed)
    return (student.predict(s.x_eval, s.language_eval) == s.labels_eval).numpy()


def fit(s: Situation, variant: Variant, setting: dict[str, Any], seed: int) -> Student:
    torch.manual_seed(seed)
    n_teachers, _, n_classes = s.teacher_logits.shape
    n_languages, per_language = s.own.shape[1], ROWS_PER_LANGUAGE
    kd_weight: float = setting["kd_weight"]
    prior = fixed_prior(s, variant, setting)[:, s.language_ids]  # [K, N]
    logits, beta = s.teacher_logits, setting["beta"]
    labelled = s.labels >= 0
    if variant.shuffle or variant.labelled_margins_only:
        weights = row_weights(s, variant, beta)
        if variant.shuffle:
            # Only among rows of one language and alike labelled: what is left is chance.
            generator = torch.Generator().manual_seed(seed)
            kind = 2 * s.language_ids + labelled
            for value in kind.unique().tolist():
                rows = (kind == value).nonzero().squeeze(1)
                weights[:, rows] = weights[:, rows[torch.randperm(len(rows), generator=generator)]]
        else:
            weights = torch.where(labelled, weights, 1 / n_teachers)
        prior, beta = prior * weights, float("inf")
    adaptive = None
    if variant.prior == "adaptive":
        adaptive = AdaptiveStrategy(
            n_teachers,
            n_languages,
            importance_temperature=setting["prior_temperature"],
            gap_temperature=setting["gap_temperature"],
        )
        held_logits, held_labels, held_ids = s.calibration
        adaptive.start(statistics(held_logits, held_labels, variant.weighting).margins, held_ids)
        adaptive.step()
    smoothing = 0.0
    if variant.smoothing:
        # The gold class of the smoothed target has the mean probability that the teachers' mean gives it.
        mean = (logits / TEMPERATURE).softmax(-1).mean(0)[labelled]
        gold = float(mean.gather(1, s.labels[labelled].unsqueeze(1)).mean())
        smoothing = (1 - gold) * n_classes / (n_classes - 1)
    student = Student(n_languages, s.x.shape[1], n_classes)
    optimizer = torch.optim.AdamW(student.parameters(), 2e-3, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, s.steps)
    draws = s.language_ids
    if kd_weight == 0 and not labelled.all():
        # Rows without a label would be no more than idle steps.
        draws = torch.where(labelled, s.language_ids, -1)
    for rows in batches(draws, n_languages, per_language, s.steps):
        ids = s.language_ids[rows]
        student.train()
        output = student(s.x[rows].view(n_languages, per_language, -1)).flatten(0, 1)
        row_prior, weight = prior[:, rows], None
        if adaptive is not None:
            row_prior, weight = row_prior * adaptive.teacher_prior(ids), adaptive.sample_weight(ids)
        loss, stats = amtss_loss(
            output,
            logits[:, rows],
            s.labels[rows],
            temperature=TEMPERATURE,
            weighting=variant.weighting,  # type: ignore[arg-type]
            weight_temperature=beta,
            teacher_prior=row_prior,
            sample_weight=weight,
            kd_weight=kd_weight,
            ce_weight=1 - kd_weight,
            label_smoothing=smoothing,
            return_stats=True,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if adaptive is not None:
            adaptive.update(stats, ids, row_mask=labelled[rows])
            adaptive.step()
    return student


def statistics(logits: Tensor, labels: Tensor, weighting: str, beta: float = float("inf")) -> Any:
    return amtss_loss(
        torch.zeros_like(logits[0]),
        logits,
        labels,
        temperature=TEMPERATURE,
        weighting=weighting,  # type: ignore[arg-type]
        weight_temperature=beta,
        return_stats=True,
    )[1]


def row_weights(s: Situation, variant: Variant, beta: float) -> Tensor:
    weights: Tensor = statistics(s.teacher_logits, s.labels, variant.weighting, beta).weights
    return weights.clone()


def fixed_prior(s: Situation, variant: Variant, setting: dict[str, Any]) -> Tensor:
    """[K, L] weights that no training changes."""
    logits, labels, ids = s.calibration
    right = (logits.argmax(-1) == labels).float()
    if variant.prior == "single":
        best = int(right.mean(1).argmax())
        return F.one_hot(torch.tensor(best), len(logits)).float().unsqueeze(1).expand(s.own.shape).clone()
    if variant.prior == "static":
        counts = F.one_hot(ids, s.own.shape[1]).float()
        accuracy = right @ counts / counts.sum(0)
        static: Tensor = (accuracy / setting["prior_temperature"]).softmax(0)
        return static
    if variant.prior == "routing":
        return s.own.float()
    return torch.ones(s.own.shape)


def run_design(
    texts: Texts,
    design: Design,
    variants: dict[str, Variant],
    seeds: Sequence[int],
    tune: Sequence[int],
    quick: bool,
) -> dict[str, Any]:
    """Chooses the settings of each variant on the seeds `tune`, then tests them on `seeds`."""
    result = choose(texts, design, variants, tune, quick)
    return result | test(texts, design, variants, result["chosen"], seeds, quick) if seeds else result


def choose(
    texts: Texts, design: Design, variants: dict[str, Variant], tune: Sequence[int], quick: bool
) -> dict[str, Any]:
    started = time.time()
    tuned: dict[str, list[list[float]]] = {name: [[] for _ in v.settings()] for name, v in variants.items()}
    for seed in tune:
        situation = draw(texts, design, seed, test=False, quick=quick)
        for name, variant in variants.items():
            for place, setting in enumerate(variant.settings()):
                tuned[name][place].append(float(train_student(situation, variant, setting, seed).mean()))
        print(f"  tuning seed {seed}: {time.time() - started:.0f} s", flush=True)
    means = {name: [float(np.mean(scores)) for scores in places] for name, places in tuned.items()}
    chosen = {name: variants[name].settings()[int(np.argmax(scores))] for name, scores in means.items()}
    return {
        "chosen": chosen,
        "tuning": {
            name: [dict(s, accuracy=a) for s, a in zip(variants[name].settings(), means[name], strict=True)]
            for name in variants
        },
    }


def test(
    texts: Texts,
    design: Design,
    variants: dict[str, Variant],
    chosen: dict[str, dict[str, Any]],
    seeds: Sequence[int],
    quick: bool,
) -> dict[str, Any]:
    started = time.time()
    right: dict[str, list[np.ndarray]] = {name: [] for name in variants}
    teachers, concepts = [], np.array([])
    for seed in seeds:
        situation = draw(texts, design, seed, test=True, quick=quick)
        teachers.append(situation.teacher_accuracy)
        concepts = situation.concepts_eval
        for name, variant in variants.items():
            right[name].append(train_student(situation, variant, chosen[name], seed))
        print(f"  seed {seed}: {time.time() - started:.0f} s", flush=True)
    table = {name: per_concept(np.stack(values), concepts) for name, values in right.items()}
    return {
        "test": summary(right, table),
        "teachers": np.mean(teachers, 0).tolist(),
        "seconds": time.time() - started,
    }


def summary(right: dict[str, list[np.ndarray]], table: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    return {
        name: {
            "accuracy": float(np.mean([values.mean() for values in right[name]])),
            "per_seed": [float(values.mean()) for values in right[name]],
            "minus_uniform": interval(table[name], table[UNIFORM]),
            "minus_labels": interval(table[name], table[LABELS_ONLY]),
        }
        for name in right
    }


NEW, NEW_ROWS = "sw", 200
# Who is heard, settings, and whether all other texts of the language are there too, without labels.
NEW_VARIANTS: dict[str, tuple[Variant, bool]] = {
    LABELS_ONLY: (Variant(kd_weights=(0.0,)), False),
    UNIFORM: (Variant(), False),
    "own teacher": (Variant("routing"), False),
    "row margins": (Variant(betas=(0.05, 0.2)), False),
    "own teacher, and unlabelled texts": (Variant("routing"), True),
    "row margins, and unlabelled texts": (Variant(betas=(0.05, 0.2)), True),
}


def new_language(texts: Texts, seeds: Sequence[int], tune: Sequence[int], quick: bool) -> dict[str, Any]:
    """A student of all other languages learns `NEW` from `NEW_ROWS` labelled texts; only its projection is trained."""
    started = time.time()
    language = texts.languages.index(NEW)
    tuned: dict[str, dict[str, list[float]]] = {name: {} for name in NEW_VARIANTS}
    for seed in tune:
        s = draw(texts, DESIGNS["transfer"].everything(), seed, test=False, quick=quick)
        student = fit(without(s, language), VARIANTS[UNIFORM], VARIANTS[UNIFORM].settings()[1], seed)
        here = s.language_eval == language
        for name, (variant, unlabelled) in NEW_VARIANTS.items():
            for setting in variant.settings():
                model = project(student, s, language, variant, setting, unlabelled, seed, quick)
                score = float(of_language(model, s, here).mean())
                tuned[name].setdefault(json.dumps(setting), []).append(score)
    places = {
        name: [dict(json.loads(setting), accuracy=float(np.mean(values))) for setting, values in scores.items()]
        for name, scores in tuned.items()
    }
    best = {name: max(found, key=lambda place: place["accuracy"]) for name, found in places.items()}
    chosen = {name: {k: v for k, v in place.items() if k != "accuracy"} for name, place in best.items()}
    if not seeds:
        return {"chosen": chosen, "tuning": places}
    right: dict[str, list[np.ndarray]] = {}
    concepts = np.array([])
    for seed in seeds:
        s = draw(texts, DESIGNS["transfer"].everything(), seed, test=True, quick=quick)
        student = fit(without(s, language), VARIANTS[UNIFORM], VARIANTS[UNIFORM].settings()[1], seed)
        here = s.language_eval == language
        concepts = s.concepts_eval[here.numpy()]
        models = {name: (*NEW_VARIANTS[name], chosen[name]) for name in NEW_VARIANTS}
        students = {"nearest projection, untrained": start_projection(student, *new_rows(s, language, seed)[:3])}
        for name, (variant, unlabelled, setting) in models.items():
            students[name] = project(student, s, language, variant, setting, unlabelled, seed, quick)
        for name, model in students.items():
            right.setdefault(name, []).append(of_language(model, s, here))
        right.setdefault("its own teacher", []).append(s.own_teacher(language).numpy())
    table = {name: per_concept(np.stack(values), concepts) for name, values in right.items()}
    chosen["nearest projection, untrained"] = chosen["its own teacher"] = {}
    return {
        "chosen": chosen,
        "tuning": places,
        "test": summary(right, table),
        "teachers": [float(np.mean([v.mean() for v in right["its own teacher"]]))],
        "seconds": time.time() - started,
    }


def of_language(student: Student, s: Situation, rows: Tensor) -> np.ndarray:
    """Whether a student of one language is right in these rows of the evaluation."""
    classes = student.predict(s.x_eval[rows], torch.zeros(int(rows.sum()), dtype=torch.long))
    return (classes == s.labels_eval[rows]).numpy()


def without(s: Situation, language: int) -> Situation:
    """The rows of all other languages; their ids close up."""

    def ids(values: Tensor) -> Tensor:
        return values - (values > language).long()

    kept, kept_held = s.language_ids != language, s.calibration[2] != language
    logits, labels, held_ids = s.calibration
    return replace(
        s,
        x=s.x[kept],
        labels=s.labels[kept],
        language_ids=ids(s.language_ids[kept]),
        teacher_logits=s.teacher_logits[:, kept].contiguous(),
        calibration=(logits[:, kept_held], labels[kept_held], ids(held_ids[kept_held])),
        own=torch.cat([s.own[:, :language], s.own[:, language + 1 :]], 1),
    )


def new_rows(s: Situation, language: int, seed: int) -> tuple[Tensor, Tensor, int, Tensor]:
    """Vectors and labels of the language's rows, labelled ones first; how many are labelled; and the row numbers."""
    rows = (s.language_ids == language).nonzero().squeeze(1)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    labels = s.labels[rows].clone()
    labels[NEW_ROWS:] = -1
    return s.x[rows], labels, NEW_ROWS, rows


def start_projection(student: Student, x: Tensor, labels: Tensor, labelled: int) -> Student:
    """A student of one language that starts as the nearest of the others: the largest mean margin of the labels."""
    margins = []
    student.eval()
    with torch.no_grad():
        for weight, bias in zip(student.weight, student.bias, strict=True):
            logits = student.classifier(x[:labelled] + torch.tanh(x[:labelled] @ weight + bias))
            margins.append(float(statistics(logits.unsqueeze(0), labels[:labelled], "label_margin").margins.mean()))
    nearest = int(np.argmax(margins))
    new = Student(1, x.shape[1], student.classifier.out_features)
    new.classifier.load_state_dict(student.classifier.state_dict())
    new.weight.data[0], new.bias.data[0] = student.weight.data[nearest], student.bias.data[nearest]
    new.classifier.requires_grad_(False)
    return new


def project(
    student: Student,
    s: Situation,
    language: int,
    variant: Variant,
    setting: dict[str, Any],
    unlabelled: bool,
    seed: int,
    quick: bool,
) -> Student:
    torch.manual_seed(seed)
    x, labels, labelled, rows = new_rows(s, language, seed)
    new = start_projection(student, x, labels, labelled)
    count = len(x) if unlabelled else labelled
    logits = s.teacher_logits[:, rows]
    prior = fixed_prior(s, variant, setting)[:, language]
    optimizer = torch.optim.AdamW([new.weight, new.bias], 2e-3, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, 40 if quick else 200)
    for batch in batches(torch.zeros(count, dtype=torch.long), 1, 64, 40 if quick else 200):
        loss = amtss_loss(
            new.train()(x[batch].unsqueeze(0))[0],
            logits[:, batch],
            labels[batch],
            temperature=TEMPERATURE,
            weight_temperature=setting["beta"],
            teacher_prior=prior,
            kd_weight=setting["kd_weight"],
            ce_weight=1 - setting["kd_weight"],
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return new


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


def show(name: str, result: dict[str, Any]) -> str:
    lines = [f"\n### {name}\n"]
    if "test" not in result:
        lines += ["| variant | accuracy on tuning concepts | settings |", "| --- | --- | --- |"]
        for variant, places in result["tuning"].items():
            best = max(places, key=lambda place: place["accuracy"])
            lines.append(f"| {variant} | {100 * best['accuracy']:.2f} | {settings(best)} |")
        return "\n".join(lines)
    lines += ["| variant | accuracy | minus uniform | minus labels only | chosen |", "| --- | --- | --- | --- | --- |"]

    def points(cell: dict[str, float]) -> str:
        return f"{cell['points']:+.2f} ({cell['low']:+.2f} to {cell['high']:+.2f})"

    for variant, cell in result["test"].items():
        against = [points(cell[key]) for key in ("minus_uniform", "minus_labels")]
        lines.append(
            f"| {variant} | {100 * cell['accuracy']:.2f} | {against[0]} | {against[1]} | "
            f"{settings(result['chosen'][variant])} |"
        )
    shown = ", ".join(f"{100 * a:.1f}" for a in result["teachers"])
    return "\n".join([*lines, f"\nTeachers, each in its own languages: {shown}."])


def settings(chosen: dict[str, Any]) -> str:
    short = {"kd_weight": "kd", "beta": "β", "prior_temperature": "T", "gap_temperature": "gap"}
    left_out = {("prior_temperature", 1.0), ("gap_temperature", None), ("beta", float("inf"))}
    return ", ".join(f"{short[k]} {v:g}" for k, v in chosen.items() if k in short and (k, v) not in left_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="folder or Hub id of a multilingual encoder with 12 layers")
    parser.add_argument("--cache", type=Path, default=Path("build/features"), help="folder of its sentence vectors")
    parser.add_argument("--designs", default=",".join([*DESIGNS, NEW_LANGUAGE]), help="default: %(default)s")
    parser.add_argument("--variants", help="with ; between them; default: all")
    parser.add_argument("--languages", help="fewer than all fifteen, to see that it runs: en,sw,tr")
    parser.add_argument("--seeds", type=int, default=8, help="fresh seeds to test (default: %(default)s)")
    parser.add_argument("--tune-seeds", type=int, default=3, help="seeds to choose settings on (default: %(default)s)")
    parser.add_argument("--tune-only", action="store_true", help="stop before test")
    parser.add_argument("--chosen", type=Path, nargs="+", help="files of --tune-only: settings are not chosen again")
    parser.add_argument("--quick", action="store_true", help="a few steps each: to see that it runs")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    wanted = options.variants.split(";") if options.variants else list(VARIANTS)
    variants = {name: VARIANTS[name] for name in dict.fromkeys([LABELS_ONLY, UNIFORM, *wanted])}
    texts = read_texts(options.encoder, options.cache, options.languages and options.languages.split(","))
    results: dict[str, Any] = {"machine": machine(), "arguments": {k: str(v) for k, v in vars(options).items()}}
    tuned: dict[str, Any] = {}
    for file in options.chosen or []:
        tuned |= json.loads(file.read_text(encoding="utf-8"))
    for name in options.designs.split(","):
        print(f"{name}:", flush=True)
        seeds = [] if options.tune_only else range(options.seeds)
        tune = range(1000, 1000 + options.tune_seeds)
        if name == NEW_LANGUAGE:
            results[name] = new_language(texts, seeds or range(0), tune, options.quick)
        elif options.chosen:
            known = {variant: how for variant, how in variants.items() if variant in tuned[name]["chosen"]}
            found = test(texts, DESIGNS[name], known, tuned[name]["chosen"], seeds, options.quick)
            results[name] = tuned[name] | found
        else:
            results[name] = run_design(texts, DESIGNS[name], variants, seeds, tune, options.quick)
        print(show(name, results[name]), flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
