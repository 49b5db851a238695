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
  labeled rows and initial weights. KD weight (cross entropy gets 1 minus it) and the other settings of a variant are
  chosen by mean accuracy over the tuning seeds, on concepts that neither student nor teachers saw; then fresh seeds are
  trained once with what was chosen, and tested once on the held-out concepts.
- Differences are paired; their intervals (95 %) come from a bootstrap over concepts and seeds, never over rows.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from cases import machine
from features import sentence_vectors
from students import INF, Setting, Situation, Students, Variant, fit, statistics
from torch import Tensor, nn

from amtss_fast._system.files import write_atomically
from amtss_fast.data import load_data

BETAS = (0.05, 0.2, 0.5)
GROUPS = {
    "west": ["en", "fr", "es", "de", "vi", "sw", "tr"],
    "east": ["en", "de", "el", "bg", "ru", "tr"],
    "south": ["en", "ar", "ur", "hi", "th", "zh", "vi"],
}
LAYERS = (2, 3, 4, 6, 9, 12)
STUDENT_LAYER, STUDENT_SIZE = 3, 96
FIRST_SEED, FIRST_TUNING_SEED = 100, 2000
LABELS_ONLY, UNIFORM = "labels only", "uniform"
NEW_LANGUAGE, NEW, NEW_ROWS = "new language", "sw", 200
WIDER = f"{NEW_LANGUAGE}, wider student"


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
    """A situation: what the teachers learned from, what the student gets, and how much of it is labeled."""

    teacher_layer: int
    teacher_size: int
    teacher_share: float = 1.0
    """Share of the concepts that teachers learn from; the student gets the others, or the same ones at 1."""
    labeled: float = 1.0
    half_classes: bool = False
    """Teachers of all languages that each saw half of the classes, cross-fitted by concept, in place of GROUPS."""
    steps: int = 360
    student_size: int = STUDENT_SIZE


DESIGNS = {
    "transfer": Design(teacher_layer=4, teacher_size=384, teacher_share=0.8, steps=240),
    "few labels": Design(teacher_layer=12, teacher_size=128, labeled=0.1),
    "half the classes": Design(teacher_layer=12, teacher_size=128, labeled=0.1, half_classes=True),
    "all labels": Design(teacher_layer=12, teacher_size=128),
    NEW_LANGUAGE: Design(teacher_layer=4, teacher_size=384),
    WIDER: Design(teacher_layer=4, teacher_size=384, student_size=192),
}


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
    x = texts.components(STUDENT_LAYER, design.student_size * len(texts.vectors))
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
    if design.labeled < 1:
        # Whole concepts are labeled, so that no label comes back in another language.
        kept = rng.permutation(learned)[: round(design.labeled * len(learned))]
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
NEAREST, OWN_TEACHER = "nearest projection, untrained", "its own teacher"

Found = list[tuple[np.ndarray, float | None]]
"""Of each variant and setting asked for: right answers, and the share of right targets where there are any."""


def answers(
    s: Situation, wanted: Sequence[tuple[Variant, Setting]], seed: int, start: Students | None = None, **options: Any
) -> Found:
    found: Found = [(np.array([]), None)] * len(wanted)
    for silent in (True, False):
        places = [i for i, (_, setting) in enumerate(wanted) if (setting["kd_weight"] == 0) == silent]
        if not places:
            continue
        students, targets = fit(s, [wanted[i] for i in places], seed, start, **options)
        classes = students.logits(s.x_eval, s.language_eval).argmax(-1)
        for i, right, share in zip(places, (classes == s.labels_eval).numpy(), targets, strict=True):
            found[i] = (right, None if silent else share)
    return found


def new_language(
    texts: Texts, s: Situation, seed: int, quick: bool
) -> tuple[Students, int, Situation, Situation, Situation]:
    """A student of all other languages and its nearest projection; the rows of `NEW` of which `NEW_ROWS` have labels,
    these alone, and all rows of all languages with no other labels of `NEW`.
    """
    language = texts.languages.index(NEW)
    others = s.select([i for i in range(len(texts.languages)) if i != language])
    student, _ = fit(others, [(VARIANTS[UNIFORM], VARIANTS[UNIFORM].settings()[1])], seed)
    rows = (s.language_ids == language).nonzero().squeeze(1)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    mix = replace(s, labels=s.labels.clone())
    mix.labels[rows[NEW_ROWS:]] = -1
    new = replace(mix.select([language]), steps=40 if quick else 200)
    few = new.rows(new.labels >= 0)
    margins = []
    for like in range(len(texts.languages) - 1):
        logits = student.logits(few.x, torch.full_like(few.labels, like))
        margins.append(float(statistics(logits, few.labels, "label_margin").margins.mean()))
    return student, int(np.argmax(margins)), new, few, mix


def run_seed(
    texts: Texts, name: str, wanted: Sequence[tuple[str, Setting]], seed: int, test: bool, quick: bool
) -> tuple[Found, dict[str, np.ndarray], np.ndarray, list[float]]:
    """What was asked for; right answers of what has no settings; concepts of the answers; teachers' accuracy."""
    s = draw(texts, DESIGNS[name], seed, test, quick)
    if name not in (NEW_LANGUAGE, WIDER):
        asked = [(VARIANTS[variant], setting) for variant, setting in wanted]
        return answers(s, asked, seed), {}, s.concepts_eval, s.teacher_accuracy
    base, nearest, new, few, mix = new_language(texts, s, seed, quick)
    language = texts.languages.index(NEW)
    own = new.teacher_right[int(new.own[:, 0].int().argmax())].numpy()
    start = base.copies(1, [nearest])
    first = start.logits(new.x_eval, new.language_eval).argmax(-1)[0] == new.labels_eval
    found: Found = [(np.array([]), None)] * len(wanted)
    for unlabelled, whole in ((False, False), (True, False), (True, True)):
        places = [i for i, (variant, _) in enumerate(wanted) if NEW_VARIANTS[variant][1:] == (unlabelled, whole)]
        asked = [(NEW_VARIANTS[wanted[i][0]][0], wanted[i][1]) for i in places]
        if whole:
            every = list(range(len(texts.languages) - 1))
            grown = base.copies(1, [*every[:language], nearest, *every[language:]])
            here = (s.language_eval == language).numpy()
            done = [(right[here], share) for right, share in answers(mix, asked, seed, grown)]
        else:
            done = answers(new if unlabelled else few, asked, seed, start, whole=False, per_language=64)
        for i, answer in zip(places, done, strict=True):
            found[i] = answer
    return found, {NEAREST: first.numpy(), OWN_TEACHER: own}, new.concepts_eval, [float(own.mean())]


def run_design(
    texts: Texts,
    name: str,
    tried: dict[str, list[Setting]],
    tune: Sequence[int],
    seeds: Sequence[int],
    quick: bool,
) -> dict[str, Any]:
    """Chooses a setting of each variant on the seeds `tune`, then tests these on `seeds`."""
    started = time.time()
    wanted = [(variant, setting) for variant, places in tried.items() for setting in places]
    scores = np.zeros(len(wanted))
    for seed in tune:
        found = run_seed(texts, name, wanted, seed, False, quick)[0]
        scores += [right.mean() / len(tune) for right, _ in found]
        print(f"  tuning seed {seed}: {time.time() - started:.0f} s", flush=True)
    tuning: dict[str, dict[str, float]] = {variant: {} for variant in tried}
    best: dict[str, tuple[float, Setting]] = {}
    for (variant, setting), score in zip(wanted, scores.tolist(), strict=True):
        tuning[variant][settings(setting)] = score
        if variant not in best or score > best[variant][0]:
            best[variant] = (score, setting)
    chosen = [(variant, setting) for variant, (_, setting) in best.items()]
    result: dict[str, Any] = {
        "tuning_seeds": list(tune),
        "chosen": {variant: settings(setting) for variant, setting in chosen},
        "tuning": tuning,
    }
    if not seeds:
        return result
    rights: dict[str, list[np.ndarray]] = {}
    targets: dict[str, list[float | None]] = {}
    teachers, concepts = [], np.array([])
    for seed in seeds:
        found, extra, concepts, accuracy = run_seed(texts, name, chosen, seed, True, quick)
        teachers.append(accuracy)
        answered = {variant: answer for (variant, _), answer in zip(chosen, found, strict=True)}
        for variant, (right, share) in (answered | {n: (r, None) for n, r in extra.items()}).items():
            rights.setdefault(variant, []).append(right)
            targets.setdefault(variant, []).append(share)
        print(f"  seed {seed}: {time.time() - started:.0f} s", flush=True)
    table = {variant: per_concept(np.stack(values), concepts) for variant, values in rights.items()}
    result["test"] = {
        variant: {
            "accuracy": float(np.mean([right.mean() for right in rights[variant]])),
            "per_seed": [float(right.mean()) for right in rights[variant]],
            "targets": None if None in targets[variant] else float(np.mean(targets[variant])),  # type: ignore[arg-type]
            "minus_uniform": interval(table[variant], table[UNIFORM]),
            "minus_labels": interval(table[variant], table[LABELS_ONLY]),
        }
        for variant in rights
    }
    return result | {
        "seeds": list(seeds),
        "held_out": {"concepts": len(np.unique(concepts)), "texts": len(concepts)},
        "teachers": np.mean(teachers, 0).tolist(),
        "seconds": round(time.time() - started),
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


def show(results: dict[str, dict[str, Any]]) -> str:
    """The tables of all designs, in Markdown."""
    return "\n\n".join(f"### {name.capitalize()}\n\n{table(result)}" for name, result in results.items())


def table(result: dict[str, Any]) -> str:
    if "test" not in result:
        lines = ["| variant | accuracy on tuning concepts | settings |", "| --- | --- | --- |"]
        for variant, chosen in result["chosen"].items():
            lines.append(f"| {variant} | {100 * result['tuning'][variant][chosen]:.2f} | {chosen} |")
        return "\n".join(lines)

    def points(cell: dict[str, float]) -> str:
        return f"{cell['points']:+.2f} ({cell['low']:+.2f} to {cell['high']:+.2f})"

    columns = ["variant", "accuracy", "minus uniform", "minus labels only", "targets", "chosen"]
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    for variant, cell in result["test"].items():
        targets = "" if cell["targets"] is None else f"{100 * cell['targets']:.1f}"
        against = [points(cell[key]) for key in ("minus_uniform", "minus_labels")]
        row = [variant, f"{100 * cell['accuracy']:.2f}", *against, targets, result["chosen"].get(variant, "")]
        lines.append("| " + " | ".join(row) + " |")
    teachers = ", ".join(f"{100 * a:.1f}" for a in result["teachers"])
    seeds = f"{len(result['tuning_seeds'])} seeds to choose on, {len(result['seeds'])} to test"
    held_out = f"{result['held_out']['concepts']:,} held-out concepts ({result['held_out']['texts']:,} texts)"
    return "\n".join([*lines, "", f"Teachers, each in its own languages: {teachers}. {seeds}, {held_out}."])


def settings(chosen: Setting) -> str:
    short = {"kd_weight": "kd", "beta": "β", "prior_temperature": "T", "gap_temperature": "gap"}
    left_out = {("prior_temperature", 1.0), ("gap_temperature", None), ("beta", INF)}
    return ", ".join(f"{short[k]} {v:g}" for k, v in chosen.items() if (k, v) not in left_out)


def as_json(value: Any, depth: int = 3, margin: str = "") -> str:
    """A line for each variant of each part of each design."""
    if depth == 0 or not isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    lines = [
        f"{margin} {json.dumps(k, ensure_ascii=False)}: {as_json(v, depth - 1, margin + ' ')}" for k, v in value.items()
    ]
    return "{\n" + ",\n".join(lines) + f"\n{margin}}}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", help="folder or Hub id of a multilingual encoder with 12 layers")
    parser.add_argument("--cache", type=Path, default=Path("build/features"), help="folder of its sentence vectors")
    parser.add_argument("--data", default="cldr_topic", help="cldr_topic, cldr_pairs or a file (default: %(default)s)")
    parser.add_argument("--split", type=int, default=7, help="seed that draws the held-out concepts")
    parser.add_argument("--designs", default=";".join(DESIGNS), help="with ; between them; default: %(default)s")
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
        print(show(json.loads(options.show.read_text(encoding="utf-8"))))
        return
    if options.encoder is None:
        parser.error("--encoder is needed")
    only = options.languages and options.languages.split(",")
    texts = read_texts(options.data, options.encoder, options.cache, options.split, only)
    seeds = range(FIRST_SEED, FIRST_SEED + (0 if options.tune_only else options.seeds))
    tune = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + options.tune_seeds)
    for name in options.designs.split(";"):
        print(f"{name}:", flush=True)
        table = {n: v for n, (v, _, _) in NEW_VARIANTS.items()} if name in (NEW_LANGUAGE, WIDER) else VARIANTS
        wanted = [n for n in table if options.variants is None or n in options.variants.split(";")]
        tried = {n: table[n].settings() for n in dict.fromkeys([LABELS_ONLY, UNIFORM, *wanted])}
        result = run_design(texts, name, tried, tune, seeds, options.quick)
        title = name if options.data == "cldr_topic" else f"{name}, {Path(options.data).stem}"
        given = {k: v for k, v in vars(options).items() if v is not None and k not in ("cache", "json")}
        given |= {"encoder": Path(options.encoder).name, "data": Path(options.data).name}
        result |= {"machine": machine(), "arguments": given}
        print(show({title: result}), flush=True)
        if options.json:
            kept = json.loads(options.json.read_text(encoding="utf-8")) if options.json.is_file() else {}
            write_atomically(options.json, as_json(kept | {title: result}) + "\n")


if __name__ == "__main__":
    main()
