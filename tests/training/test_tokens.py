"""Tasks of tokens: loss, scores, and a training that is exact under accumulation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from tiny import weights, weights_of_two_processes
from tiny_tokens import LANGUAGES, TAGS, make_batch, make_rows, make_teachers, tiny_model, tokenizer

from amtss_fast import AMTSSTrainer, AMTSSTrainingArguments, amtss_loss
from amtss_fast.data import LanguageModelCollator, token_targets
from amtss_fast.teachers import Teacher, TokenTeachers
from amtss_fast.training import find_task, score_metrics
from amtss_fast.training.tasks import tokens

# Loss and scores.


@pytest.mark.parametrize("task", ["masked-lm", "causal-lm", "token-classification"])
def test_loss_and_scores_are_those_of_all_logits(task: str) -> None:
    tok, batch = tokenizer(), make_batch(task)
    teachers = make_teachers(task, tok)
    extra = {"id2label": dict(enumerate(TAGS))} if task == "token-classification" else {}
    student = tiny_model(task, "llama" if task == "causal-lm" else "bert", **extra)
    targets = token_targets(task, batch).flatten()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    n_classes = 3 if task == "token-classification" else 300
    with torch.no_grad():
        logits = [t.model(**inputs).logits[..., :n_classes].flatten(0, 1) for t in teachers.teachers]
    if task == "token-classification":
        logits = [z.flip(-1) for z in logits]
    length = batch["input_ids"].shape[1]
    rows_sw = (batch["language_ids"] == 1).repeat_interleave(length)
    options: dict[str, Any] = {"temperature": 1.5, "ce_weight": 0.5}
    expected, stats = amtss_loss(
        student(**inputs).logits.flatten(0, 1), logits, targets, return_stats=True, backend="reference",
        teacher_mask=torch.stack([torch.ones_like(rows_sw), rows_sw, torch.ones_like(rows_sw)]),
        teacher_prior=torch.tensor([1.0, 2.0, 3.0]), **options,
    )  # fmt: skip
    parameters = list(student.parameters())
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
    objective = find_task(task).objective(student)
    step = objective.step(student, batch, teachers, **options)
    loss, got_stats, language_ids = step.loss, step.stats, step.rows.language_ids
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(torch.autograd.grad(loss, parameters, allow_unused=True), wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    counts = targets != -100
    assert got_stats is not None
    torch.testing.assert_close(got_stats.weights, stats.weights[:, counts], rtol=1e-4, atol=1e-5)
    assert torch.equal(language_ids, batch["language_ids"].repeat_interleave(length)[counts])

    # Scores of the student, and of a teacher that does not teach every sequence.
    labeled = targets.clamp(min=-1) >= 0
    for scores, z, taught in (
        (objective.scores(student, batch), student(**inputs).logits.flatten(0, 1), labeled),
        (find_task(task).teacher_scores(teachers, batch)[1], logits[1], labeled & rows_sw),
    ):
        losses = F.cross_entropy(z, targets.masked_fill(~taught, -100), reduction="none").view(-1, length).sum(1)
        torch.testing.assert_close(scores[:, 0], losses, rtol=1e-4, atol=1e-5)
        right = ((z.argmax(-1) == targets) & taught).view(-1, length).sum(1)
        assert torch.equal(scores[:, 1], right.float())
        assert torch.equal(scores[:, 2], taught.view(-1, length).sum(1).float())


def scaled_teachers() -> TokenTeachers:
    """Causal models that do something to their logits, each something else."""
    models = {
        "gemma2": {"final_logit_softcapping": 1.5},
        "cohere": {"logit_scale": 0.3},
        "granite": {"logits_scaling": 3.0},
        "llama": {},
    }
    teachers = [
        Teacher(tiny_model("causal-lm", kind, seed, **options), name=kind, tokenizer=tokenizer())
        for seed, (kind, options) in enumerate(models.items(), 1)
    ]
    return TokenTeachers(teachers, task="causal-lm", languages=LANGUAGES, tokenizer=tokenizer())


@pytest.mark.parametrize(
    ("kind", "made_so"),
    [
        ("gemma2", {"final_logit_softcapping": 2.0}),
        ("gemma3_text", {"final_logit_softcapping": 2.0}),
        ("cohere", {"logit_scale": 0.4}),
        ("granite", {"logits_scaling": 0.7}),
    ],
)
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.5, "ce_weight": 0.5},
        {"divergence": "jsd", "divergence_beta": 0.3, "teacher_temperature": [1.0, 1.5, 2.0, 3.0]},
    ],
)
def test_the_loss_is_that_of_the_logits_that_models_give(
    kind: str, made_so: dict[str, Any], options: dict[str, Any]
) -> None:
    student, teachers, batch = tiny_model("causal-lm", kind, **made_so), scaled_teachers(), make_batch("causal-lm")
    targets = token_targets("causal-lm", batch).flatten()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        taught = [teacher.model(**inputs).logits.flatten(0, 1) for teacher in teachers.teachers]
    logits = student(**inputs).logits.flatten(0, 1)
    expected, stats = amtss_loss(logits, taught, targets, return_stats=True, backend="reference", **options)
    parameters = list(student.parameters())
    wanted = torch.autograd.grad(expected, parameters)
    objective = find_task("causal-lm").objective(student)
    step = objective.step(student, batch, teachers, **options)
    torch.testing.assert_close(step.loss, expected, rtol=1e-5, atol=1e-6)
    assert step.stats is not None
    torch.testing.assert_close(step.stats.kd, stats.kd[:, targets != -100], rtol=1e-4, atol=1e-6)
    for a, b in zip(torch.autograd.grad(step.loss, parameters), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    scores = [objective.scores(student, batch), *find_task("causal-lm").teacher_scores(teachers, batch)]
    for got, z in zip(scores, [logits, *taught], strict=True):
        losses = F.cross_entropy(z, targets, reduction="none").view(len(got), -1).sum(1)
        torch.testing.assert_close(got[:, 0], losses, rtol=1e-4, atol=1e-5)


def test_metrics() -> None:
    scores = np.array([[2.0, 1, 2], [3.0, 3, 4], [0.5, 1, 1], [0.0, 0, 0]])
    metrics = score_metrics(scores, np.array([0, 1, 0, 2]), ["en", "sw", "ur"])
    assert metrics["accuracy"] == 5 / 7
    assert metrics["loss"] == pytest.approx(5.5 / 7)
    assert metrics["accuracy_en"] == 2 / 3
    assert metrics["count_sw"] == 4
    assert metrics["gap_en"] == pytest.approx(3 / 4 - 2 / 3)
    assert metrics["worst_accuracy"] == 2 / 3
    assert metrics["macro_accuracy"] == pytest.approx((2 / 3 + 3 / 4) / 2)
    assert "accuracy_ur" not in metrics
    with pytest.raises(ValueError, match="no label in 2 rows"):
        score_metrics(np.zeros((2, 3)), np.zeros(2, dtype=int), ["en"])


# Training.


def make_trainer(folder: Path, task: str = "masked-lm", **options: Any) -> AMTSSTrainer:
    tok = tokenizer()
    defaults: dict[str, Any] = {
        "task": task, "optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "num_train_epochs": 1,
        "per_device_train_batch_size": 16, "logging_steps": 1, "ce_weight": 0.5, "use_cpu": True, "disable_tqdm": True,
        "save_strategy": "no", "report_to": "none",
    }  # fmt: skip
    return AMTSSTrainer(
        tiny_model(task, "llama" if task == "causal-lm" else "bert"),
        AMTSSTrainingArguments(str(folder), **defaults | options),
        teachers=make_teachers(task, tok),
        train_dataset=make_rows(),
        eval_dataset=make_rows(20, seed=1),
        data_collator=LanguageModelCollator(tok, task),
    )


@pytest.mark.parametrize("task", ["masked-lm", "causal-lm"])
def test_a_step_is_the_mean_over_its_target_tokens(tmp_path: Path, task: str) -> None:
    whole = make_trainer(tmp_path / "1", task)
    parts = make_trainer(
        tmp_path / "8", task, per_device_train_batch_size=2, gradient_accumulation_steps=8, chunk_rows=5,
        activation_checkpointing=True,
    )  # fmt: skip
    start = weights(whole)
    for trainer in (whole, parts):
        trainer.train()
    assert whole.state.global_step == parts.state.global_step == 3
    moved = (weights(whole) - start).norm()
    assert moved > 1e-2
    assert (weights(whole) - weights(parts)).norm() < 1e-5 * moved
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (whole, parts)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    metrics = whole.evaluate()
    batch = LanguageModelCollator(tokenizer(), task)(list(whole.eval_dataset))
    with torch.no_grad():
        logits = whole.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = token_targets(task, batch)
    assert metrics["eval_loss"] == pytest.approx(float(F.cross_entropy(logits.flatten(0, 1), targets.flatten())), 1e-4)
    assert metrics["eval_count_en"] + metrics["eval_count_sw"] == int((targets >= 0).sum())


@pytest.fixture
def forget_device() -> Iterator[Callable[[], None]]:
    """A process has one device, that of its first trainer."""

    def forget() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)

    yield forget
    forget()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("task", ["masked-lm", "causal-lm"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_training_on_a_gpu_is_that_on_the_cpu(
    tmp_path: Path, forget_device: Callable[[], None], task: str, everywhere: bool
) -> None:
    cpu = make_trainer(tmp_path / "cpu", task)
    start = weights(cpu)
    cpu.train()
    want = cpu.evaluate()["eval_loss"]
    forget_device()
    gpu = make_trainer(tmp_path / "gpu", task, use_cpu=False)
    # Without `everywhere` the teachers stay on the CPU.
    for teacher in gpu.teachers.teachers if everywhere else ():
        teacher.to("cuda")
    gpu.train()
    moved = (weights(cpu) - start).norm()
    assert moved > 1e-2
    assert (weights(cpu) - weights(gpu).cpu()).norm() < 1e-3 * moved
    assert gpu.evaluate()["eval_loss"] == pytest.approx(want, rel=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_autocast_has_the_head_in_its_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget_device: Callable[[], None]
) -> None:
    seen = set()
    fused = tokens.linear_amtss_loss

    def spy(hidden: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        seen.add(hidden.dtype)
        return fused(hidden, *arguments, **options)

    cpu = make_trainer(tmp_path / "cpu")
    start = weights(cpu)
    cpu.train()
    monkeypatch.setattr(tokens, "linear_amtss_loss", spy)
    forget_device()
    gpu = make_trainer(tmp_path / "gpu", use_cpu=False, bf16=True)
    gpu.train()
    assert seen == {torch.bfloat16}
    assert (weights(cpu) - weights(gpu).cpu()).norm() < 0.1 * (weights(cpu) - start).norm()


def test_two_processes_are_one_big_batch(tmp_path: Path) -> None:
    options = "per_device_train_batch_size=4, gradient_accumulation_steps=2"
    two = weights_of_two_processes(tmp_path, "test_tokens", f"make_trainer({tmp_path / 'two'!r}, {options})")
    one = make_trainer(tmp_path / "one")
    start = weights(one)
    one.train()
    moved = (weights(one) - start).norm()
    assert moved > 1e-2
    assert (weights(one) - two).norm() < 1e-5 * moved


def test_students_of_another_task_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="task must be one of sequence-classification, masked-lm"):
        make_trainer(tmp_path, task="summary")
    trainer = make_trainer(tmp_path)
    args = AMTSSTrainingArguments(str(tmp_path), use_cpu=True, task="causal-lm")
    with pytest.raises(ValueError, match=r"teachers are for task 'masked-lm', args.task is 'causal-lm'"):
        AMTSSTrainer(trainer.model, args, teachers=trainer.teachers)
    args = AMTSSTrainingArguments(str(tmp_path), use_cpu=True, kd_weight=0.0, ce_weight=1.0)
    with pytest.raises(ValueError, match="trains an AMTSSForSequenceClassification, got BertForMaskedLM"):
        AMTSSTrainer(trainer.model, args, languages=LANGUAGES)
