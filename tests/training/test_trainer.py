"""The training loop: exact under accumulation, resumed to the same weights, and what it logs and evaluates."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from tiny import LABELS, tiny_bert_config, tiny_teacher, tiny_tokenizer, weights, weights_of_two_processes
from transformers import HfArgumentParser

from amtss_fast import AMTSSForSequenceClassification
from amtss_fast.data import DistillationCollator, LanguageSampler, encode
from amtss_fast.teachers import TeacherPool, load_teacher
from amtss_fast.training import AMTSSTrainer, AMTSSTrainingArguments, classification_metrics

LANGUAGES = ["en", "sw", "ur"]
# The strategy changes with every step: what holds with it holds without.
ADAPTIVE = {"importance_temperature": 0.1, "gap_temperature": 0.1}


@pytest.fixture(scope="module")
def teacher_folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("teachers")
    return [tiny_teacher(folder / name, seed=seed) for seed, name in enumerate(("a", "b"))]


def make_rows(n: int = 96, seed: int = 0) -> Dataset:
    """Texts whose words give the label away, a third of them without a label."""
    rng = np.random.default_rng(seed)
    words = ("apple table", "dog rain", "cat chair")
    labels = rng.integers(3, size=n)
    features = Features({"text": Value("string"), "label": ClassLabel(names=list(LABELS)), "language": Value("string")})
    rows = {
        "text": [f"{words[y]} {words[rng.integers(3)]} {'a' * rng.integers(1, 6)}" for y in labels],
        "label": [-1 if i % 3 == 0 else int(y) for i, y in enumerate(labels)],
        "language": [LANGUAGES[i] for i in rng.integers(3, size=n)],
    }
    return Dataset.from_dict(rows, features=features)


def make_trainer(folder: Path, teachers: list[Path] | None, dropout: float = 0.0, **options: Any) -> AMTSSTrainer:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    config = tiny_bert_config(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    model = AMTSSForSequenceClassification.from_encoder(
        config, languages=LANGUAGES, id2label=list(LABELS), classifier_dropout=dropout
    )
    pool = None
    if teachers is not None:
        languages = (None, ["sw", "ur"])
        pool = TeacherPool(
            [load_teacher(f, name=f.name, languages=codes) for f, codes in zip(teachers, languages, strict=True)],
            label_names=LABELS,
            languages=LANGUAGES,
            tokenizer=tokenizer,
        )
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_steps": 4,
        "ce_weight": 0.5,
    }
    encoded = encode(make_rows(), tokenizer, languages=LANGUAGES, max_length=24)
    return AMTSSTrainer(
        model,
        AMTSSTrainingArguments(str(folder), **{**defaults, **options}),
        teachers=pool,
        train_dataset=encoded,
        eval_dataset=encode(make_rows(30, seed=1), tokenizer, languages=LANGUAGES, max_length=24),
        data_collator=DistillationCollator(tokenizer),
        processing_class=tokenizer,
    )


def test_gradient_accumulation_is_one_big_batch(tmp_path: Path, teacher_folders: list[Path]) -> None:
    # SGD: Adam would turn rounding of near-zero gradients into steps of full size.
    options = {"optim": "sgd", "learning_rate": 0.1, "logging_steps": 1, "max_grad_norm": 0.0, **ADAPTIVE}
    whole = make_trainer(tmp_path / "1", teacher_folders, per_device_train_batch_size=32, **options)
    parts = make_trainer(tmp_path / "4", teacher_folders, gradient_accumulation_steps=4, **options)
    start = weights(whole)
    for trainer in (whole, parts):
        trainer.train()
    assert whole.state.global_step == parts.state.global_step == 3
    moved = (weights(whole) - start).norm()
    assert moved > 1e-2
    assert (weights(whole) - weights(parts)).norm() < 1e-5 * moved
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (whole, parts)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_two_processes_are_one_big_batch(tmp_path: Path, teacher_folders: list[Path]) -> None:
    options = {
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 16,
        **ADAPTIVE,
    }
    two_options = {**options, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    make = f"make_trainer({tmp_path / 'two'!r}, {teacher_folders!r}, **{two_options!r})"
    two = weights_of_two_processes(tmp_path, "test_trainer", make)
    one = make_trainer(tmp_path / "one", teacher_folders, **options)
    start = weights(one)
    one.train()
    moved = (weights(one) - start).norm()
    assert moved > 1e-2
    assert (weights(one) - two).norm() < 1e-5 * moved


def test_resumes_to_the_same_weights(tmp_path: Path, teacher_folders: list[Path]) -> None:
    options = {"save_strategy": "steps", "save_steps": 5, "num_train_epochs": 1, "dropout": 0.1, **ADAPTIVE}
    whole = make_trainer(tmp_path / "run", teacher_folders, **options)
    whole.train()
    assert whole.state.global_step == 12
    resumed = make_trainer(tmp_path / "run", teacher_folders, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))
    assert resumed.state.global_step == 12
    assert torch.equal(weights(whole), weights(resumed))
    assert whole.adaptive is not None
    assert resumed.adaptive is not None
    for name, value in whole.adaptive.state_dict().items():
        assert torch.equal(value, resumed.adaptive.state_dict()[name])


def test_distillation_lowers_the_divergence_and_logs_what_the_teachers_do(
    tmp_path: Path, teacher_folders: list[Path]
) -> None:
    trainer = make_trainer(tmp_path, teacher_folders, num_train_epochs=6)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs[-1]["kd"] < 0.7 * logs[0]["kd"]
    last = logs[-1]
    # Teacher b does not teach English.
    assert last["teacher_weight/a/en"] == pytest.approx(1)
    assert last["teacher_weight/b/en"] == 0
    for code in ("sw", "ur"):
        assert 0 < last[f"teacher_weight/a/{code}"] < 1
        assert last[f"teacher_weight/a/{code}"] + last[f"teacher_weight/b/{code}"] == pytest.approx(1)
        assert -1 <= last[f"teacher_margin/b/{code}"] <= 1
        assert -1 <= last[f"student_margin/{code}"] <= 1


def test_the_adaptive_strategy_starts_held_out_and_moves_the_loss(tmp_path: Path, teacher_folders: list[Path]) -> None:
    trainer = make_trainer(
        tmp_path, teacher_folders, num_train_epochs=2, importance_temperature=0.01, gap_temperature=0.1
    )
    adaptive = trainer.adaptive
    assert adaptive is not None
    trainer.start_adaptive()
    held_out = adaptive.teacher_margin.clone()
    # Of 30 texts 20 have a label, and teacher b does not teach English.
    assert adaptive.teacher_rows[0].sum() == 20
    assert adaptive.teacher_rows[1, 0] == 0
    rows = trainer.eval_dataset
    assert trainer.teachers is not None
    here = [i for i in range(30) if rows["labels"][i] >= 0 and rows["language_ids"][i] == 1]
    logits, _ = trainer.teachers.logits(trainer.data_collator([rows[i] for i in here]))
    p = (logits[0] / 2).softmax(-1)
    label = torch.tensor([rows["labels"][i] for i in here]).unsqueeze(1)
    margins = p.gather(1, label)[:, 0] - p.scatter(1, label, -1.0).amax(1)
    assert float(held_out[0, 1]) == pytest.approx(float(margins.mean()), abs=1e-6)

    trainer = make_trainer(
        tmp_path, teacher_folders, num_train_epochs=2, importance_temperature=0.01, gap_temperature=0.1
    )
    trainer.train()
    assert trainer.adaptive is not None
    # 64 of 96 rows have a label; the running means go on from the held-out ones.
    assert trainer.adaptive.teacher_rows[0].sum() == 2 * 64 + 20
    last = [log for log in trainer.state.log_history if "loss" in log][-1]
    share = float(trainer.adaptive.importance[0, 1])
    assert abs(share - 0.5) > 0.02
    assert last["teacher_importance/a/sw"] == pytest.approx(share)
    assert last["teacher_importance/b/sw"] == pytest.approx(1 - share)
    assert abs(last["teacher_weight/a/sw"] - 0.5) > 0.01
    assert "teacher_importance/b/en" not in last
    assert len({last[f"language_weight/{code}"] for code in LANGUAGES}) > 1


@pytest.mark.parametrize("epochs", [1, 3])
def test_adaptive_sampling_resumes_to_the_same_weights(
    tmp_path: Path, teacher_folders: list[Path], epochs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = LanguageSampler.__init__
    monkeypatch.setattr(LanguageSampler, "__init__", lambda self, *a, **k: real(self, *a, **{**k, "chunk": 16}))
    options = {"save_strategy": "steps", "save_steps": 5, "num_train_epochs": epochs, "language_sampling": "adaptive"}
    options |= {"gap_temperature": 0.02}
    whole = make_trainer(tmp_path / "run", teacher_folders, **options)
    whole.train()
    assert whole.language_sampler is not None
    drawn = whole.language_sampler.state_dict()
    assert drawn["epoch"] == epochs - 1
    if epochs == 1:
        # Later the student has caught up, and there is no gap left to weigh.
        assert len({tuple(p) for p in drawn["drawn"]}) > 2
    resumed = make_trainer(tmp_path / "run", teacher_folders, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{15 * epochs - 10}"))
    assert torch.equal(weights(whole), weights(resumed))


def test_evaluates_each_language_and_keeps_the_best(tmp_path: Path, teacher_folders: list[Path]) -> None:
    trainer = make_trainer(
        tmp_path,
        teacher_folders,
        num_train_epochs=3,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="macro_accuracy",
        save_total_limit=1,
    )
    trainer.train()
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert len(evaluations) == 3
    best = max(log["eval_macro_accuracy"] for log in evaluations)
    assert trainer.state.best_metric == best
    final = trainer.evaluate()
    assert final["eval_macro_accuracy"] == best
    assert sum(final[f"eval_count_{code}"] for code in LANGUAGES) == 20
    assert "eval_accuracy_sw" in final


def test_labels_alone(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, None, kd_weight=0.0, ce_weight=1.0, num_train_epochs=8)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs[-1]["loss"] < 0.7 * logs[0]["loss"]
    assert not any(name.startswith("teacher_weight") for name in logs[-1])


@pytest.mark.parametrize("options", [{"bf16": True}, {"activation_checkpointing": True}, {"report_to": "tensorboard"}])
def test_stock_options(tmp_path: Path, teacher_folders: list[Path], options: dict[str, Any]) -> None:
    trainer = make_trainer(tmp_path, teacher_folders, max_steps=3, **options)
    assert math.isfinite(trainer.train().training_loss)
    if "report_to" in options:
        assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_options_reach_the_loss(tmp_path: Path, teacher_folders: list[Path]) -> None:
    losses = set()
    changes: list[dict[str, Any]] = [
        {}, {"temperature": 4.0}, {"weighting": "label_nll"}, {"weight_temperature": 0.0}, {"kd_weight": 0.5},
        {"ce_weight": 0.1}, {"label_smoothing_factor": 0.2}, {"importance_temperature": 0.1},
        {"divergence": "jsd"}, {"divergence": "jsd", "divergence_beta": 0.2}, {"divergence": "tvd"},
        {"teacher_temperature": 4.0}, {"teacher_temperature": [2.0, 4.0]},
    ]  # fmt: skip
    for number, options in enumerate(changes):
        trainer = make_trainer(tmp_path / str(number), teacher_folders, max_steps=1, logging_steps=1, **options)
        losses.add(round(trainer.train().training_loss, 6))
    assert len(losses) == len(changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be positive and finite, got -1.0"),
        ({"weighting": "margin"}, "weighting must be one of"),
        ({"weight_temperature": math.nan}, "weight_temperature must be in"),
        ({"kd_weight": 0.0, "ce_weight": 0.0}, "must not both be 0"),
        ({"divergence": "kl"}, "divergence must be one of .*, got 'kl'"),
        ({"divergence_beta": 0.3}, "divergence_beta has no meaning for divergence='forward_kl', got 0.3"),
        ({"divergence": "jsd", "divergence_beta": 1.0}, r"divergence_beta must be in \(0, 1\)"),
        ({"teacher_temperature": [2.0, 0.0]}, r"teacher_temperature\[1\] must be positive and finite, got 0.0"),
        ({"label_smoothing_factor": 1.5}, "label_smoothing must be in"),
        ({"importance_temperature": 0.0}, "importance_temperature must be above 0"),
        ({"language_sampling": "even"}, "language_sampling must be one of"),
        ({"language_sampling": "balanced", "train_sampling_strategy": "group_by_length"}, "draws the rows itself"),
        ({"language_sampling": "adaptive"}, "needs gap_temperature"),
        ({"language_sampling": "temperature", "language_sampling_exponent": 2.0}, r"must be in \[0, 1\], got 2.0"),
    ],
)
def test_arguments_are_checked(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AMTSSTrainingArguments(str(tmp_path), **options)


@pytest.mark.parametrize("given", [None, 3, [2, 3.0], (np.float32(2), 3)])
def test_arguments_are_what_their_json_gives(tmp_path: Path, given: Any) -> None:
    options = {"teacher_temperature": given, "divergence": "skew_forward_kl", "use_cpu": True}
    args = AMTSSTrainingArguments(str(tmp_path), **options)
    written = json.loads(args.to_json_string())
    again = AMTSSTrainingArguments(**{name: written[name] for name in ("output_dir", *options)})
    assert again.teacher_temperature == args.teacher_temperature == written["teacher_temperature"]
    assert again.loss_options() == args.loss_options()
    assert args.loss_options().divergence_beta == 0.1


def test_arguments_of_a_command_line(tmp_path: Path) -> None:
    options = "--use_cpu true --divergence jsd --divergence_beta 0.3 --teacher_temperature 2 3.5"
    parsed = HfArgumentParser(AMTSSTrainingArguments).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), *options.split()]
    )
    chosen = parsed[0].loss_options()
    assert (chosen.divergence, chosen.divergence_beta, chosen.teacher_temperature) == ("jsd", 0.3, (2.0, 3.5))


def test_teachers_and_weights_must_fit(tmp_path: Path, teacher_folders: list[Path]) -> None:
    with pytest.raises(ValueError, match="distillation needs teachers"):
        make_trainer(tmp_path, None)
    with pytest.raises(ValueError, match="needs teachers=None and kd_weight=0"):
        make_trainer(tmp_path, teacher_folders, kd_weight=0.0)
    with pytest.raises(ValueError, match=r"teacher_temperature must .* for each of 2 teachers, got 3"):
        make_trainer(tmp_path, teacher_folders, teacher_temperature=[1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"teacher_temperature must .* for each of 0 teachers, got 2"):
        make_trainer(tmp_path, None, kd_weight=0.0, ce_weight=1.0, teacher_temperature=[1.0, 2.0])
    student = make_trainer(tmp_path, teacher_folders)
    pool = TeacherPool([load_teacher(teacher_folders[0])], label_names=LABELS, languages=["en"])
    with pytest.raises(ValueError, match=r"teachers are for languages \['en'\]"):
        AMTSSTrainer(student.model, student.args, teachers=pool)


def test_metrics_of_each_language() -> None:
    logits = np.log(np.array([[0.7, 0.3], [0.2, 0.8], [0.6, 0.4], [0.9, 0.1], [0.5, 0.5]]))
    metrics = classification_metrics(logits, np.array([0, 1, 1, 0, -1]), np.array([0, 0, 0, 1, 1]), ["en", "sw", "ur"])
    assert metrics["accuracy"] == 3 / 4
    assert metrics["accuracy_en"] == 2 / 3
    assert metrics["accuracy_sw"] == 1
    assert metrics["macro_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert metrics["worst_accuracy"] == 2 / 3
    assert metrics["gap_en"] == pytest.approx(1 / 3)
    assert metrics["gap_sw"] == 0
    assert metrics["count_en"] == 3
    assert metrics["loss_en"] == pytest.approx(-(math.log(0.7) + math.log(0.8) + math.log(0.4)) / 3)
    assert "accuracy_ur" not in metrics
    with pytest.raises(ValueError, match="no labeled row among 5"):
        classification_metrics(logits, np.full(5, -1), np.zeros(5), ["en"])
