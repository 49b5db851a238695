"""The most tokens that a model takes, and whether its tokens see later ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_bert_config, tiny_tokenizer
from tiny_students import make_student
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BertLMHeadModel, PretrainedConfig

from amtss_fast.models import max_input_tokens, max_positions, sees_later_tokens

_SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "pad_token_id": 1,
    "max_position_embeddings": 20,
}


def make_config(model_type: str, **options: Any) -> PretrainedConfig:
    return AutoConfig.for_model(model_type, **{**_SMALL, **options})


def run(config: PretrainedConfig, length: int) -> None:
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    ids = torch.randint(4, 50, (1, length))
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize(
    ("model_type", "options", "limit"),
    [
        ("bert", {}, 20),
        ("distilbert", {}, 20),
        ("electra", {"embedding_size": 16}, 20),
        ("albert", {"embedding_size": 16}, 20),
        # Positions start behind the padding's row.
        ("roberta", {}, 18),
        ("roberta", {"pad_token_id": 0}, 19),
        ("xlm-roberta", {}, 18),
        ("camembert", {}, 18),
        ("mpnet", {}, 18),
        ("gpt2", {}, 20),
        ("nystromformer", {"segment_means_seq_len": 10, "num_landmarks": 10}, 20),
    ],
)
def test_tables_of_positions(model_type: str, options: dict[str, Any], limit: int) -> None:
    config = make_config(model_type, **options)
    assert max_positions(config) == limit
    run(config, limit)
    with pytest.raises((IndexError, RuntimeError)):
        run(config, limit + 1)


@pytest.mark.parametrize(
    ("model_type", "options", "limit"),
    [
        ("llama", {"num_key_value_heads": 2}, 20),
        ("qwen2", {"num_key_value_heads": 2}, 20),
        ("modernbert", {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}, 20),
        ("deberta-v2", {"position_biased_input": False, "relative_attention": True, "pos_att_type": ["c2p"]}, 20),
        ("t5", {"d_model": 16, "d_kv": 8, "d_ff": 16, "max_position_embeddings": None}, None),
    ],
)
def test_models_without_a_table_state_their_limit(model_type: str, options: dict[str, Any], limit: int | None) -> None:
    config = make_config(model_type, **options)
    assert max_positions(config) == limit
    if model_type != "t5":
        run(config, 21)


def test_a_student_has_its_encoders_positions() -> None:
    student = make_student()
    assert max_positions(student.config) == 64
    assert max_input_tokens(student, tiny_tokenizer(model_max_length=30)) == 30
    assert max_input_tokens(student, tiny_tokenizer(model_max_length=int(1e30))) == 64


@pytest.mark.parametrize(
    ("model_type", "options", "sees"),
    [
        ("gpt2", {}, False),
        ("llama", {"num_key_value_heads": 2}, False),
        ("qwen2", {"num_key_value_heads": 2}, False),
        ("bert", {"is_decoder": True}, False),
        ("bert", {}, True),
        ("roberta", {}, True),
    ],
)
def test_who_sees_later_tokens(model_type: str, options: dict[str, Any], sees: bool) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(model_type, **options))
    assert sees_later_tokens(model) is sees
    assert model.training
    assert sees_later_tokens(model.base_model) is sees


def test_half_precision_does_not_hide_it() -> None:
    torch.manual_seed(0)
    config = tiny_bert_config()
    assert sees_later_tokens(BertLMHeadModel(config).to(torch.bfloat16))
    config.is_decoder = True
    assert not sees_later_tokens(BertLMHeadModel(config).to(torch.bfloat16))
