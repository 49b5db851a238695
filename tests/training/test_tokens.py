"""Tasks of tokens: heads taken off, targets, masks, and a training that is exact under accumulation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from datasets import Dataset
from tiny import tiny_bert_config, tiny_tokenizer, weights, weights_of_two_processes
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForTokenClassification,
    BertForMaskedLM,
    PreTrainedModel,
)

from amtss_fast import QuantizedWeight, amtss_loss
from amtss_fast.models.heads import OutputHead
from amtss_fast.teachers.teacher import Teacher, load_teacher
from amtss_fast.training.tasks import tokens
from amtss_fast.training.tasks.tokens import (
    LanguageModelCollator,
    TokenTask,
    TokenTeachers,
    teacher_scores,
    token_metrics,
    token_targets,
)
from amtss_fast.training.trainer import AMTSSTrainer, AMTSSTrainingArguments

LANGUAGES = ["en", "sw"]
TAGS = ("O", "THING", "PLACE")


def tiny_model(task: str, model_type: str, seed: int = 0, **options: Any) -> PreTrainedModel:
    sizes = {
        "vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24,
        "max_position_embeddings": 64, "num_key_value_heads": 1, "head_dim": 8, "embedding_size": 16,
        "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "initializer_range": 0.3,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    known = AutoConfig.for_model(model_type)
    config = AutoConfig.for_model(model_type, **{k: v for k, v in sizes.items() if hasattr(known, k)} | options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        auto = {"masked-lm": AutoModelForMaskedLM, "causal-lm": AutoModelForCausalLM}
        model = auto.get(task, AutoModelForTokenClassification).from_config(config)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tokenizer() -> Any:
    made = tiny_tokenizer(vocab_size=299)
    made.add_special_tokens({"mask_token": "[MASK]"})
    assert len(made) == 300
    return made


def make_rows(n: int = 48, seed: int = 0) -> Dataset:
    rng = np.random.default_rng(seed)
    words = ["apple", "dog", "cat", "table", "chair", "rain", "red", "under", "the", "paka", "gato"]
    ids = tokenizer()([" ".join(rng.choice(words, rng.integers(2, 9))) for _ in range(n)])["input_ids"]
    return Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(i) for i in ids],
                              "language_ids": rng.integers(2, size=n).tolist()})  # fmt: skip


def make_batch(task: str, n: int = 6) -> dict[str, torch.Tensor]:
    rows = make_rows(n)
    if task != "token-classification":
        return LanguageModelCollator(tokenizer(), task, mask_probability=0.4)(list(rows))
    batch = LanguageModelCollator(tokenizer(), "causal-lm")(list(rows))
    return batch | {"labels": batch["labels"] % 3 - (batch["input_ids"] % 7 == 0).long()}


# Heads.


@pytest.mark.parametrize(
    ("task", "model_type", "scale"),
    [
        ("masked-lm", "bert", 1), ("masked-lm", "xlm-roberta", 1), ("masked-lm", "distilbert", 1),
        ("masked-lm", "electra", 1), ("causal-lm", "gpt2", 1), ("causal-lm", "llama", 1), ("causal-lm", "phi", 1),
        ("causal-lm", "cohere", 0.0625), ("causal-lm", "granite", 0.125),
    ],
)  # fmt: skip
def test_hidden_states_and_head_give_the_logits(task: str, model_type: str, scale: float) -> None:
    model = tiny_model(task, model_type, **({"logits_scaling": 8.0} if model_type == "granite" else {}))
    head = OutputHead(model, "it")
    assert head.scale == scale
    ids = torch.randint(3, 300, (3, 7))
    with torch.no_grad():
        hidden = head.hidden(model, input_ids=ids)
        assert hidden.shape[:2] == (3, 7)
        torch.testing.assert_close(F.linear(hidden, head.weight, head.bias), model(input_ids=ids).logits)


class _Capped(BertForMaskedLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = self.change(output.logits)
        return output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z: 30 * (z / 30).tanh(), "changes its logits behind its output embeddings"),
        (lambda z: z.clamp(max=20), "changes its logits behind its output embeddings"),
        (lambda z: z + 0.5, "adds to its logits"),
        (lambda z: z[..., :100], "does not make its logits by calling its output embeddings once"),
        (lambda z: z.softmax(-1), "adds to its logits"),
    ],
)
def test_logits_that_are_changed_behind_the_head_are_refused(change: Any, message: str) -> None:
    model = _Capped(tiny_bert_config())
    model.change = change
    with pytest.raises(ValueError, match=message):
        OutputHead(model, "it")


def test_heads_that_cannot_be_taken_off() -> None:
    with pytest.raises(ValueError, match=r"Gemma2ForCausalLM changes .* \(final_logit_softcapping = 30.0\)"):
        OutputHead(tiny_model("causal-lm", "gemma2"), "it")
    with pytest.raises(ValueError, match="BertForTokenClassification has no output embeddings"):
        OutputHead(tiny_model("token-classification", "bert"), "it")
    # Its bias lies outside of the head, and is 0 as long as nobody trains it.
    esm = tiny_model("masked-lm", "esm", mask_token_id=4)
    esm.lm_head.bias.data.zero_()
    with pytest.raises(ValueError, match="adds to its logits"):
        OutputHead(esm, "it")


# Targets and masks.


def test_targets() -> None:
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 0], [0, 8, 9, 4]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]),
        "labels": torch.tensor([[5, 6, -100, 0], [0, 8, 9, 4]]),
    }
    assert token_targets("masked-lm", batch).tolist() == [[5, 6, -100, -100], [-100, 8, 9, 4]]
    # Position t predicts t + 1: never padding, never the first token, never from padding.
    assert token_targets("causal-lm", batch).tolist() == [[6, -100, -100, -100], [-100, 9, 4, -100]]
    with pytest.raises(ValueError, match=r"must have the shape of input_ids \[2, 4\] for task 'masked-lm', got \[2\]"):
        token_targets("masked-lm", batch | {"labels": torch.zeros(2)})


def test_masks_depend_on_seed_epoch_and_row_alone() -> None:
    tok, rows = tokenizer(), list(make_rows(400))
    collate = LanguageModelCollator(tok, "masked-lm", seed=3)
    whole, parts = collate(rows), [collate(rows[i : i + 7]) for i in range(0, 400, 7)]
    for name in ("input_ids", "labels"):
        flat = [batch[name][batch["attention_mask"].bool()] for batch in parts]
        assert torch.equal(whole[name][whole["attention_mask"].bool()], torch.cat(flat))
    original = torch.nn.utils.rnn.pad_sequence([torch.tensor(r["input_ids"]) for r in rows], batch_first=True)
    picked = whole["labels"] >= 0
    special = torch.isin(original, torch.tensor(tok.all_special_ids))
    assert not (picked & special).any()
    assert torch.equal(whole["labels"][picked], original[picked])
    assert torch.equal(whole["input_ids"][~picked], original[~picked])
    n = int((~special).sum())
    assert abs(int(picked.sum()) / n - 0.15) < 4 * (0.15 * 0.85 / n) ** 0.5
    share = float((whole["input_ids"][picked] == tok.mask_token_id).float().mean())
    assert 0.7 < share < 0.9
    collate.epoch = 1
    assert not torch.equal(collate(rows)["labels"], whole["labels"])
    with pytest.raises(ValueError, match="task must be one of masked-lm, causal-lm; got 'x'"):
        LanguageModelCollator(tok, "x")
    with pytest.raises(ValueError, match=r"mask_probability must be in \(0, 1\), got 1"):
        LanguageModelCollator(tok, "masked-lm", mask_probability=1)
    with pytest.raises(ValueError, match="tokenizer with a mask token"):
        LanguageModelCollator(tiny_tokenizer(), "masked-lm")


# Loss and scores.


def make_teachers(task: str, tok: Any) -> TokenTeachers:
    types = {"causal-lm": ("llama", "gpt2", "cohere")}.get(task, ("bert", "electra", "bert"))
    extra = {"id2label": dict(enumerate(TAGS[::-1]))} if task == "token-classification" else {}
    models = [tiny_model(task, t, seed, **extra) for seed, t in enumerate(types, 1)]
    if task != "token-classification":
        # Padded to another size.
        models[2].resize_token_embeddings(312)
    languages = (None, ["sw"], None)
    teachers = [
        Teacher(m, name=f"t{k}", languages=codes, tokenizer=tok, prior=1.0 + k)
        for k, (m, codes) in enumerate(zip(models, languages, strict=True))
    ]
    names = TAGS if task == "token-classification" else None
    return TokenTeachers(teachers, task=task, languages=LANGUAGES, tokenizer=tok, label_names=names)


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
    loss, got_stats, language_ids = TokenTask(task, student, LANGUAGES).loss(student, batch, teachers, **options)
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
    labelled = targets.clamp(min=-1) >= 0
    for scores, z, taught in (
        (TokenTask(task, student, LANGUAGES).scores(student, batch), student(**inputs).logits.flatten(0, 1), labelled),
        (teacher_scores(teachers, batch)[1], logits[1], labelled & rows_sw),
    ):
        losses = F.cross_entropy(z, targets.masked_fill(~taught, -100), reduction="none").view(-1, length).sum(1)
        torch.testing.assert_close(scores[:, 0], losses, rtol=1e-4, atol=1e-5)
        right = ((z.argmax(-1) == targets) & taught).view(-1, length).sum(1)
        assert torch.equal(scores[:, 1], right.float())
        assert torch.equal(scores[:, 2], taught.view(-1, length).sum(1).float())


def test_teachers_must_fit() -> None:
    tok, model = tokenizer(), tiny_model("masked-lm", "bert")

    def pool(**options: Any) -> TokenTeachers:
        given: dict[str, Any] = {"task": "masked-lm", "languages": LANGUAGES, "tokenizer": tok}
        teachers = [Teacher(model, name="a", **options.pop("teacher", {}))]
        return TokenTeachers(options.pop("teachers", teachers), **given | options)

    for options, message in (
        ({"task": "summary"}, "task must be one of masked-lm"),
        ({"teachers": []}, "at least one teacher"),
        ({"teachers": [Teacher(model, name="a")] * 2}, "different names"),
        ({"label_names": TAGS}, "label_names belong to token-classification"),
        ({"teacher": {"tokenizer": tiny_tokenizer()}}, "teacher 'a' has another tokenizer"),
        ({"teacher": {"languages": ["ur"]}}, "teaches ur, which the student has not"),
    ):
        with pytest.raises(ValueError, match=message):
            pool(**options)
    model.cls.predictions.transform.LayerNorm.weight.data[3] = torch.nan
    student = tiny_model("masked-lm", "bert")
    task = TokenTask("masked-lm", student, LANGUAGES)
    with pytest.raises(RuntimeError, match=r"teacher 'a' \(torch.float32\) gave values that are not finite"):
        task.loss(student, make_batch("masked-lm"), pool())


@pytest.mark.parametrize(("task", "model_type", "tied"), [("masked-lm", "bert", True), ("causal-lm", "llama", False)])
def test_an_8_bit_teacher_has_an_8_bit_head(tmp_path: Path, task: str, model_type: str, tied: bool) -> None:
    tok = tokenizer()
    tiny_model(task, model_type).save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    student, batch = tiny_model(task, model_type, seed=1), make_batch(task)
    losses, sizes, scores = [], [], []
    for precision in ("float32", "int8"):
        teacher = load_teacher(tmp_path, task=task, precision=precision)
        pool = TokenTeachers([teacher], task=task, languages=LANGUAGES, tokenizer=tok)
        losses.append(TokenTask(task, student, LANGUAGES).loss(student, batch, pool)[0].item())
        sizes.append(teacher.memory_footprint())
        scores.append(teacher_scores(pool, batch)[0][:, 0].sum().item())
    codes = pool.heads[0].weight
    assert isinstance(codes, QuantizedWeight)
    assert (codes.codes.data_ptr() == teacher.model.get_input_embeddings().weight.data_ptr()) == tied
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    assert losses[1] != losses[0]
    assert scores[1] == pytest.approx(scores[0], rel=0.1)
    # Two matrices of 300 x 16 in float32, or one that both share.
    assert sizes[0] - sizes[1] > 0.7 * 300 * 16 * 4 * (1 if tied else 2)


def test_metrics() -> None:
    scores = np.array([[2.0, 1, 2], [3.0, 3, 4], [0.5, 1, 1], [0.0, 0, 0]])
    metrics = token_metrics(scores, np.array([0, 1, 0, 2]), ["en", "sw", "ur"])
    assert metrics["accuracy"] == 5 / 7
    assert metrics["loss"] == pytest.approx(5.5 / 7)
    assert metrics["accuracy_en"] == 2 / 3
    assert metrics["count_sw"] == 4
    assert metrics["gap_en"] == pytest.approx(3 / 4 - 2 / 3)
    assert metrics["worst_accuracy"] == 2 / 3
    assert metrics["macro_accuracy"] == pytest.approx((2 / 3 + 3 / 4) / 2)
    assert "accuracy_ur" not in metrics
    with pytest.raises(ValueError, match="no labelled token"):
        token_metrics(np.zeros((2, 3)), np.zeros(2, dtype=int), ["en"])


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
