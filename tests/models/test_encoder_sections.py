"""Sections that describe an encoder, and checkpoints that do not make one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TEXTS, tiny_bert_config, tiny_tokenizer
from tiny_students import IDS, logits_of, make_batch, make_student
from transformers import BertForSequenceClassification, BertModel, LlamaConfig, T5Config, ViTConfig

from amtss_fast import AMTSSForSequenceClassification
from amtss_fast.errors import UserError
from amtss_fast.models import load_tokenizer, normalize_label, read_encoder
from amtss_fast.models.names import check_languages, show_names

BERT = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def read(**values: Any) -> Any:
    return read_encoder({**BERT, "intermediate_size": 16, **values}, tiny_tokenizer(), whose="student.encoder")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": None}, "model_type is missing"),
        ({"model_type": "brt"}, "model_type 'brt' is unknown; did you mean 'b"),
        ({"model_type": ["bert"]}, r"model_type \['bert'\] is unknown"),
        ({"hiden_size": 16}, "'bert' has no setting 'hiden_size', got 16; did you mean 'hidden_size'"),
        ({"n_layers": 16}, "'bert' has no setting 'n_layers'"),
        ({"to_dict": 1}, "no setting 'to_dict'"),
        ({"num_labels": 3}, "num_labels is set by the run"),
        ({"hidden_size": "16"}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size must be an integer of at least 1, got 0"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be at least 0, got -1"),
        ({"num_attention_heads": 3}, "hidden size .*3"),
        ({"hidden_act": "relu7"}, "relu7"),
        ({"vocab_size": 100}, "has 100 rows .* it needs 300"),
        ({"pad_token_id": 7}, "pad_token_id is 7, but its tokenizer pads with 0"),
        ({"model_type": "vit"}, "type 'vit' reads no texts, it reads pixel_values"),
    ],
)
def test_wrong_sections(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(**values)
    assert str(caught.value).startswith("student.encoder: ")
    assert "\n" not in str(caught.value)


def test_settings_that_a_class_knows_by_other_names() -> None:
    config = read(dtype="float32", attn_implementation="eager", max_position_embeddings=40)
    assert (config.vocab_size, config.pad_token_id, config.max_position_embeddings) == (300, 0, 40)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    rope = read_encoder({"model_type": "llama", "num_key_value_heads": 2, "rope_theta": 5e5, **small}, tiny_tokenizer())
    assert isinstance(rope, LlamaConfig)
    assert rope.rope_parameters["rope_theta"] == 5e5
    assert read_encoder({"model_type": "gpt2", "n_embd": 16, "n_head": 2}, tiny_tokenizer()).hidden_size == 16


def test_checkpoints_that_make_no_student(tmp_path: Path) -> None:
    ViTConfig(hidden_size=16).save_pretrained(tmp_path / "vit")
    with pytest.raises(UserError, match="type 'vit' reads no texts"):
        make_student(tmp_path / "vit")
    with pytest.raises(UserError, match="type 't5' is an encoder-decoder"):
        make_student(T5Config(hidden_size=16, is_encoder_decoder=False))
    with pytest.raises(FileNotFoundError, match=r"encoder: there is no folder .*none"):
        make_student(tmp_path / "none")
    BertModel(tiny_bert_config(num_hidden_layers=2)).save_pretrained(tmp_path / "bert")
    tiny_bert_config(num_hidden_layers=1).save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match=r"layers that config.json leaves out: encoder.layer.1"):
        make_student(tmp_path / "bert")
    # The head of a classifier is no part of an encoder.
    BertForSequenceClassification(tiny_bert_config()).save_pretrained(tmp_path / "classifier")
    make_student(tmp_path / "classifier")
    larger = tiny_tokenizer()
    larger.add_tokens([f"<{i}>" for i in range(10)])
    with pytest.raises(UserError, match=r"student.encoder \(.*\): its embedding table has 300 rows .* needs 310"):
        read_encoder(tmp_path / "classifier", larger, whose="student.encoder")


def test_damaged_students(tmp_path: Path) -> None:
    make_student().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:700])
    with pytest.raises(UserError, match=r"student \(.*\): SafetensorError"):
        AMTSSForSequenceClassification.from_pretrained(tmp_path)
    file.write_bytes(whole)
    config = json.loads((tmp_path / "config.json").read_text())
    config["languages"].append("xx")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"student \(.*\): .* lacks projections.3"):
        AMTSSForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_padding_on_the_left(pooling: str) -> None:
    student = make_student(pooling=pooling)
    right = logits_of(student)
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    batch = dict(tokenizer(list(TEXTS), padding=True, return_tensors="pt"))
    assert (batch["input_ids"][:, 0] == 0).any()
    assert torch.equal(logits_of(student, IDS, **batch), right)
    one = [logits_of(student, IDS[i : i + 1], **make_batch((text,))) for i, text in enumerate(TEXTS)]
    torch.testing.assert_close(right, torch.cat(one), rtol=1e-4, atol=1e-5)


def test_a_loaded_tokenizer_pads_on_the_right(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).padding_side == "right"


def test_predict_with_another_models_tokenizer() -> None:
    larger = tiny_tokenizer()
    larger.add_tokens(["<a>"])
    with pytest.raises(UserError, match="gave the id 300, the student's embedding table has 300 rows"):
        make_student().predict(["<a>"], "en", tokenizer=larger)


def test_names_are_compared_composed() -> None:
    assert normalize_label(" CAFE\u0301 ") == normalize_label("caf\u00e9")
    assert show_names(["a", "\u00e9"], ["e\u0301"]) == "['a', '\u00e9']"
    assert show_names(["\u0435n"], ["en"]) == "['\u0435n' ('\\u0435n')]"
    for codes in (["pt-BR", "pt_br"], ["es", "ES"]):
        with pytest.raises(UserError, match="languages must be different"):
            check_languages(codes)
