"""The student: its formula, its languages, its checkpoints."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LABELS, tiny_bert_config
from tiny_students import IDS, LANGUAGES, logits_of, make_batch, make_student
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertModel,
    DebertaV2Config,
    DistilBertConfig,
    PretrainedConfig,
    XLMRobertaConfig,
)

from amtss_fast import AMTSSConfig, AMTSSForSequenceClassification


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("activation", ["tanh", "gelu", "silu"])
@pytest.mark.parametrize("classifier", ["shared", "per_language"])
def test_each_row_follows_the_formula(pooling: str, activation: str, classifier: str) -> None:
    student = make_student(pooling=pooling, projection_activation=activation, classifier=classifier)
    batch = make_batch()
    logits = logits_of(student, **batch)
    functions: dict[str, Any] = {"tanh": torch.tanh, "gelu": F.gelu, "silu": F.silu}
    function = functions[activation]
    for n, language in enumerate(IDS.tolist()):
        length = int(batch["attention_mask"][n].sum())
        row = {name: value[n : n + 1, :length] for name, value in batch.items()}
        with torch.no_grad():
            hidden = student.encoder(**row).last_hidden_state[0]
        pooled = hidden.mean(0) if pooling == "mean" else hidden[0]
        projection = student.projections[language]
        z = pooled + function(projection.weight @ pooled + projection.bias)
        head = student.classifiers[0 if classifier == "shared" else language]
        torch.testing.assert_close(logits[n], head.weight @ z + head.bias, rtol=1e-4, atol=1e-5)


def test_fresh_projections_are_the_identity_and_learn() -> None:
    torch.manual_seed(0)
    student = AMTSSForSequenceClassification.from_encoder(tiny_bert_config(), languages=LANGUAGES, id2label=LABELS)
    batch = make_batch()
    student.eval()
    assert torch.equal(logits_of(student, IDS, **batch), logits_of(student, IDS.flip(0), **batch))
    student(**batch, language_ids=IDS, labels=torch.tensor([0, 1, 2, 0, 1])).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in student.projections.parameters())
    # DDP refuses parameters that no gradient reaches.
    assert all(p.grad is not None for p in student.parameters())


def test_the_loss_ignores_unlabeled_and_ignored_rows() -> None:
    student, batch = make_student(), make_batch()
    labels = torch.tensor([0, -1, 2, -100, 1])
    output = student(**batch, language_ids=IDS, labels=labels)
    kept = labels >= 0
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits[kept], labels[kept]))
    none = student(**batch, language_ids=IDS, labels=torch.tensor([-1, -100, -1, -1, -1])).loss
    none.backward()
    assert none.item() == 0
    assert all(not p.grad.any() for p in student.parameters())
    as_tuple = student(**batch, language_ids=IDS, labels=labels, return_dict=False)
    assert torch.equal(as_tuple[0], output.loss)
    assert torch.equal(as_tuple[1], output.logits)


def test_padding_does_not_matter() -> None:
    student, batch = make_student(), make_batch()
    wider = {name: F.pad(value, (0, 7)) for name, value in batch.items()}
    wider["input_ids"][:, -7:] = 55
    torch.testing.assert_close(logits_of(student, **wider), logits_of(student, **batch))
    full = batch["input_ids"][:1, : int(batch["attention_mask"][0].sum())]
    with torch.no_grad():
        alone = student(input_ids=full, language_ids=IDS[:1]).logits
    torch.testing.assert_close(alone, logits_of(student, **batch)[:1])


@pytest.mark.parametrize("classifier", ["shared", "per_language"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("like", [None, "es"])
def test_add_language_keeps_the_bits_of_the_others(classifier: str, dtype: torch.dtype, like: str | None) -> None:
    student = make_student(classifier=classifier, dtype=dtype)
    before = logits_of(student)
    old = copy.deepcopy(student)
    assert student.add_language("ur", like=like) == 3
    assert torch.equal(logits_of(student), before)
    # Rows of the new language beside them change nothing either.
    mixed = torch.where(torch.arange(5) == 1, 3, IDS)
    rows = torch.arange(5) != 1
    assert torch.equal(logits_of(student, mixed)[rows], before[rows])
    assert student.config.languages == [*LANGUAGES, "ur"]
    new = dict(student.projections[3].named_parameters())
    assert all(p.dtype == dtype and p.requires_grad for p in new.values())
    for name, parameter in new.items():
        values = torch.stack([p.get_parameter(name) for p in old.projections]).float()
        expected = values.mean(0) if like is None else values[1]
        assert torch.equal(parameter, expected.to(dtype))
    if like is not None:
        twin = torch.where(IDS == 1, 3, IDS)
        assert torch.equal(logits_of(student, twin), before)


@pytest.mark.parametrize("classifier", ["shared", "per_language"])
def test_training_a_new_language_keeps_the_bits_of_the_others(classifier: str) -> None:
    student, batch = make_student(classifier=classifier), make_batch()
    before = logits_of(student)
    student.add_language("ur", like="en")
    student.freeze_all_but("ur")
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    expected = {"projections.3.weight", "projections.3.bias"}
    if classifier == "per_language":
        expected |= {"classifiers.3.weight", "classifiers.3.bias"}
    assert trained == expected
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.1, weight_decay=0.1)
    ids = torch.tensor([3, 0, 3, 1, 2])
    new_before = logits_of(student, ids)[0]
    student.train()
    for _ in range(3):
        optimizer.zero_grad()
        student(**batch, language_ids=ids, labels=torch.tensor([2, 1, 2, 0, 1])).loss.backward()
        optimizer.step()
    student.eval()
    assert torch.equal(logits_of(student), before)
    assert not torch.equal(logits_of(student, ids)[0], new_before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classifier", ["shared", "per_language"])
def test_save_and_load_round_trip(tmp_path: Path, dtype: torch.dtype, classifier: str) -> None:
    student = make_student(classifier=classifier, dtype=dtype, pooling="cls")
    student.add_language("ur")
    ids = torch.tensor([3, 2, 1, 0, 3])
    student.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    for auto in (AMTSSForSequenceClassification, AutoModelForSequenceClassification):
        loaded = auto.from_pretrained(tmp_path)
        assert type(loaded) is AMTSSForSequenceClassification
        assert loaded.dtype == dtype
        assert not loaded.training
        assert torch.equal(logits_of(loaded, ids), logits_of(student, ids))
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, AMTSSConfig)
    assert config.languages == ["en", "es", "sw", "ur"]
    assert config.label_names == list(LABELS)
    assert (config.pooling, config.classifier) == ("cls", classifier)
    assert config.text_config.hidden_size == 16


def test_auto_classes_know_it_in_a_fresh_process(tmp_path: Path) -> None:
    student = make_student()
    student.save_pretrained(tmp_path)
    script = (
        "import sys, amtss_fast.models\n"
        "from transformers import AutoModelForSequenceClassification as Auto\n"
        "print(type(Auto.from_pretrained(sys.argv[1])).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "AMTSSForSequenceClassification"


@pytest.mark.parametrize(
    "config",
    [
        DistilBertConfig(vocab_size=300, dim=16, n_layers=1, n_heads=2, hidden_dim=32),
        XLMRobertaConfig(
            vocab_size=300,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=66,
        ),
        # Has no sdpa attention.
        DebertaV2Config(
            vocab_size=300,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_other_encoders(tmp_path: Path, config: PretrainedConfig) -> None:
    # DistilBERT has no token types: they are dropped.
    student = make_student(config)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(student))
    student(**make_batch(), language_ids=IDS, labels=torch.zeros(5).long()).loss.backward()
    assert all(p.grad is not None for p in student.parameters())


def test_from_encoder_loads_checkpoints(tmp_path: Path) -> None:
    torch.manual_seed(1)
    classifier = BertForSequenceClassification(tiny_bert_config(attn_implementation="eager"))
    classifier.bert.save_pretrained(tmp_path)
    weights = {name: value for name, value in classifier.bert.state_dict().items() if not name.startswith("pooler")}
    for source in (tmp_path, str(tmp_path), classifier, classifier.bert):
        student = make_student(source)
        loaded = student.encoder.state_dict()
        assert loaded.keys() == weights.keys()
        assert all(torch.equal(loaded[name], value) for name, value in weights.items())
    # A model is copied, with its choice of attention, and stays whole.
    assert student.encoder.config._attn_implementation == "eager"
    assert student.encoder.embeddings is not classifier.bert.embeddings
    assert classifier.bert.pooler is not None
    half = BertModel(tiny_bert_config()).bfloat16()
    half.save_pretrained(tmp_path / "half")
    assert {p.dtype for p in make_student(tmp_path / "half").parameters()} == {torch.float32}
    assert make_student(half, dtype=torch.bfloat16).config.dtype == torch.bfloat16


def test_from_encoder_refuses_a_checkpoint_without_weights(tmp_path: Path) -> None:
    BertModel(tiny_bert_config(num_hidden_layers=1)).save_pretrained(tmp_path)
    tiny_bert_config(num_hidden_layers=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is no BertModel: it lacks encoder.layer.1"):
        make_student(tmp_path)


def test_compile_without_graph_break() -> None:
    student, batch = make_student(classifier="per_language"), make_batch()
    labels = torch.tensor([0, -1, 2, -100, 1])
    eager = student(**batch, language_ids=IDS, labels=labels)
    # The tracing is what is tested here; "aot_eager" also traces the backward pass.
    compiled = torch.compile(student, fullgraph=True, backend="aot_eager")
    output = compiled(**batch, language_ids=IDS, labels=labels)
    torch.testing.assert_close(output.logits, eager.logits)
    output.loss.backward()
    gradients = [p.grad.clone() for p in student.parameters()]
    student.zero_grad()
    eager.loss.backward()
    for got, parameter in zip(gradients, student.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad)


# transformers 5.23 renamed it; 5.0 has only this name.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_autocast_and_checkpointing() -> None:
    student, batch = make_student(classifier_dropout=0.0), make_batch()
    labels = torch.tensor([0, 1, 2, 0, 1])
    with torch.autocast("cpu", torch.bfloat16):
        output = student(**batch, language_ids=IDS, labels=labels)
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.logits.float(), logits_of(student), rtol=0.05, atol=0.2)
    student.gradient_checkpointing_enable()
    student.train()
    student(**batch, language_ids=IDS, labels=labels).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())


def test_ids_out_of_range_are_named_only_where_looking_is_free() -> None:
    student, batch = make_student(), make_batch()
    with pytest.raises(ValueError, match=r"language_ids must be 0 to 2 for en, es, sw; got \[3\]"):
        student(**batch, language_ids=torch.tensor([0, 1, 2, 3, 0]))
    with pytest.raises(ValueError, match=r"language_ids .* got \[-1\]"):
        student(**batch, language_ids=torch.tensor([0, 1, 2, -1, 0]))
    with pytest.raises(ValueError, match=r"labels must be 0 to 2 for entailment.* got \[-2, 3\]"):
        student(**batch, language_ids=IDS, labels=torch.tensor([0, -1, 3, -2, -100]))
    # Without values to look at (meta tensors) nothing looks.
    meta = student.to("meta")
    on_meta = {name: value.to("meta") for name, value in batch.items() if name != "attention_mask"}
    logits = meta(**on_meta, language_ids=IDS.to("meta"), labels=IDS.to("meta")).logits
    assert logits.shape == (5, 3)


def test_wrong_language_ids() -> None:
    student, batch = make_student(), make_batch()
    with pytest.raises(ValueError, match="language_ids is missing: one id per row, 0 to 2 for en,"):
        student(**batch)
    with pytest.raises(ValueError, match=r"language_ids must have shape \[N\] = \[5\], got \[4\]"):
        student(**batch, language_ids=IDS[:4])
    with pytest.raises(TypeError, match=r"language_ids must be integers, got torch.float32"):
        student(**batch, language_ids=IDS.float())
