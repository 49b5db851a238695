"""Wrong options of a student end in an error that names the option."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import tiny_bert_config
from tiny_students import LANGUAGES, logits_of, make_student
from transformers import T5Config

from amtss_fast import AMTSSConfig


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"languages": "en"}, TypeError, "languages must be a list of language codes, got 'en'"),
        ({"languages": None}, TypeError, "languages must be a list"),
        ({"languages": []}, ValueError, "languages must hold at least one"),
        ({"languages": ["en", " "]}, ValueError, "no empty one"),
        ({"languages": ["en", "sw", "en"]}, ValueError, "languages must be different, got en"),
        ({"languages": ["en", 3]}, TypeError, "languages must be strings"),
        ({"pooling": "max"}, ValueError, "pooling must be one of mean, cls; got 'max'"),
        ({"projection_activation": "relu"}, ValueError, "one of tanh, gelu, silu; got 'relu'"),
        ({"classifier": "own"}, ValueError, "one of shared, per_language; got 'own'"),
        ({"classifier_dropout": 1.0}, ValueError, r"classifier_dropout must be in \[0, 1\), got 1"),
        ({"classifier_dropout": "0"}, TypeError, "classifier_dropout must be a number, got '0'"),
        ({"id2label": None}, ValueError, "exactly one of id2label and num_labels"),
        ({"num_labels": 3}, ValueError, "exactly one of id2label and num_labels"),
        ({"id2label": ["only"]}, ValueError, "at least 2 labels"),
        ({"id2label": None, "num_labels": 1}, ValueError, "at least 2 labels"),
        ({"id2label": ["yes", "Yes "]}, ValueError, "different names"),
        ({"id2label": {1: "yes", 2: "no"}}, ValueError, "ids 0 to C - 1"),
        ({"id2label": "yes"}, TypeError, "id2label must be a mapping or a list"),
    ],
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_student(**options)


def test_wrong_encoders() -> None:
    with pytest.raises(ValueError, match="must be an encoder's, got the encoder-decoder 't5'"):
        make_student(T5Config(vocab_size=300, d_model=16))
    with pytest.raises(TypeError, match=r"encoder must be a folder, .* got int"):
        make_student(7)
    with pytest.raises(TypeError, match="text_config must be a PretrainedConfig or a dict"):
        AMTSSConfig(languages=LANGUAGES, num_labels=3)
    with pytest.raises(ValueError, match="text_config needs a model_type"):
        AMTSSConfig({"hidden_size": 3}, LANGUAGES, num_labels=3)
    with pytest.raises(ValueError, match="label2id must be the inverse"):
        AMTSSConfig(tiny_bert_config(), LANGUAGES, id2label={0: "a", 1: "b"}, label2id={"a": 1, "b": 0})


def test_wrong_languages_to_add_or_train() -> None:
    student = make_student()
    with pytest.raises(ValueError, match="languages must be different, got es twice"):
        student.add_language("es")
    with pytest.raises(ValueError, match="language 'xx' is unknown; allowed: en, es, sw"):
        student.add_language("ur", like="xx")
    with pytest.raises(ValueError, match="language 'xx' is unknown"):
        student.freeze_all_but(["en", "xx"])
    assert student.config.languages == LANGUAGES
    assert len(student.projections) == 3
    assert all(p.requires_grad for p in student.parameters())


def test_num_labels_names_the_labels() -> None:
    student = make_student(id2label=None, num_labels=4)
    assert student.config.label_names == ["LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"]
    assert logits_of(student).shape == (5, 4)
