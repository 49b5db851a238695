"""Predictions for texts, and how long a text may be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LABELS, TEXTS, tiny_bert_config, tiny_tokenizer
from tiny_students import IDS, LANGUAGES, logits_of, make_student
from transformers import BertModel, XLMRobertaConfig

from amtss_fast import AMTSSForSequenceClassification
from amtss_fast.models import load_tokenizer, max_input_tokens


def test_predict(tmp_path: Path) -> None:
    student, tokenizer = make_student(), tiny_tokenizer()
    student.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AMTSSForSequenceClassification.from_pretrained(tmp_path)
    loaded.train()
    loaded.encoder.eval()
    codes = [LANGUAGES[i] for i in IDS.tolist()]
    results = loaded.predict(TEXTS, codes, batch_size=2)
    # The mode of each part is put back.
    assert loaded.training
    assert loaded.dropout.training
    assert not loaded.encoder.training
    expected = logits_of(student).softmax(-1)
    for result, row in zip(results, expected, strict=True):
        assert list(result.probabilities) == list(LABELS)
        got = torch.tensor(list(result.probabilities.values()))
        torch.testing.assert_close(got, row, rtol=1e-4, atol=1e-6)
        assert result.label == LABELS[int(row.argmax())]
        assert result.score == result.probabilities[result.label]
    # One code for all, and a tokenizer given by hand.
    assert student.predict(TEXTS, "sw", tokenizer=tokenizer)[0] == loaded.predict(TEXTS, ["sw"] * 5)[0]
    assert loaded.predict([], "en") == []
    # More tokens than the model has positions are cut.
    assert len(loaded.predict(["word " * 500], "en")) == 1


def test_predict_pairs() -> None:
    student, tokenizer = make_student(), tiny_tokenizer()
    first, second = list(TEXTS[:3]), list(TEXTS[2:5])
    results = student.predict(first, "es", text_pairs=second, tokenizer=tokenizer, batch_size=1)
    batch = dict(tokenizer(first, second, padding=True, return_tensors="pt"))
    assert batch["token_type_ids"].any()
    expected = logits_of(student, torch.ones(3).long(), **batch).softmax(-1)
    got = torch.tensor([list(result.probabilities.values()) for result in results])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_predict_without_a_tokenizer(tmp_path: Path) -> None:
    student = make_student()
    with pytest.raises(RuntimeError, match=r"predict needs a tokenizer, .* pass tokenizer="):
        student.predict(TEXTS, "en")
    student.save_pretrained(tmp_path)
    loaded = AMTSSForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"student \(.*\): no tokenizer found: .* tokenizer.save_pretrained"):
        loaded.predict(TEXTS, "en")
    # transformers alone would give an empty BERT tokenizer here.
    BertModel(tiny_bert_config()).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="no tokenizer found"):
        load_tokenizer(tmp_path / "bert")


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("one text", "en"), {}, TypeError, "texts must be a list of strings, got 'one text'"),
        ((["a", None], "en"), {}, TypeError, "texts must be strings, got None"),
        ((["a", "b"], ["en"]), {}, ValueError, r"one code or one per text \(2\), got 1"),
        ((["a"], "xx"), {}, ValueError, "language 'xx' is unknown; allowed: en, es, sw"),
        ((["a"], "en"), {"text_pairs": []}, ValueError, r"one entry per text \(1\), got 0"),
        ((["a"], "en"), {"text_pairs": "b"}, TypeError, "text_pairs must be a list"),
        ((["a"], "en"), {"batch_size": 0}, ValueError, "batch_size must be an integer .* got 0"),
    ],
)
def test_predict_refuses(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    student = make_student()
    with pytest.raises(error, match=message):
        student.predict(*arguments, tokenizer=tiny_tokenizer(), **options)


def test_the_most_tokens_that_fit() -> None:
    endless = tiny_tokenizer(model_max_length=10**30)
    assert max_input_tokens(make_student(), endless) == 64
    assert max_input_tokens(make_student(), tiny_tokenizer(model_max_length=20)) == 20
    # The first two of 34 positions are the padding's.
    roberta = make_student(
        XLMRobertaConfig(
            vocab_size=300,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=34,
        )
    )
    assert max_input_tokens(roberta, endless) == 32
    assert len(roberta.predict(["word " * 500], "en", tokenizer=endless)) == 1
