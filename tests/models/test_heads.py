"""Output heads as hidden states, matrix and bias."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny import tiny_bert_config
from tiny_tokens import tiny_model
from transformers import CONFIG_MAPPING, BertForMaskedLM, PreTrainedModel

from amtss_fast import quantize_weight
from amtss_fast.models import OutputHead


def logits_of(head: OutputHead, model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    hidden = head.hidden(model, input_ids=ids)
    assert hidden.shape[:2] == ids.shape
    logits = F.linear(hidden, head.weight, head.bias)
    return logits if head.softcap is None else head.softcap * (logits / head.softcap).tanh()


# The hidden states, of width 16, are divided by 16 / 4.
MINICPM3 = {
    "dim_model_base": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 8,
    "v_head_dim": 8, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("task", "model_type", "options", "scale", "softcap"),
    [
        ("masked-lm", "bert", {}, 1, None), ("masked-lm", "xlm-roberta", {}, 1, None),
        ("masked-lm", "distilbert", {}, 1, None), ("masked-lm", "electra", {}, 1, None),
        ("causal-lm", "gpt2", {}, 1, None), ("causal-lm", "llama", {}, 1, None), ("causal-lm", "phi", {}, 1, None),
        ("causal-lm", "cohere", {}, 0.0625, None), ("causal-lm", "cohere", {"logit_scale": 0.3}, 0.3, None),
        ("causal-lm", "granite", {"logits_scaling": 8.0}, 0.125, None),
        ("causal-lm", "granite", {"logits_scaling": 6.0}, 1 / 6, None),
        ("causal-lm", "gemma2", {"final_logit_softcapping": 2.5}, 1, 2.5), ("causal-lm", "gemma2", {}, 1, 30),
        ("causal-lm", "gemma2", {"final_logit_softcapping": None}, 1, None),
        ("causal-lm", "gemma3_text", {"final_logit_softcapping": 3.3}, 1, 3.3),
    ],
)  # fmt: skip
def test_hidden_states_and_head_give_the_logits(
    task: str, model_type: str, options: dict[str, Any], scale: float, softcap: float | None
) -> None:
    model = tiny_model(task, model_type, **options)
    head = OutputHead(model, "it")
    assert head.scale == pytest.approx(scale, rel=1e-7)
    assert head.softcap == (None if softcap is None else pytest.approx(softcap, rel=1e-7))
    ids = torch.randint(3, 300, (3, 7))
    with torch.no_grad():
        torch.testing.assert_close(logits_of(head, model, ids), model(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("model_type", "options", "scale"),
    [
        ("hyperclovax", {"logits_scaling": 0.7}, 0.7),
        ("falcon_h1", {"lm_head_multiplier": 0.0195}, 0.0195),
        # It is in the hidden states already.
        ("minicpm3", MINICPM3, 1),
    ],
)
def test_factors_of_newer_models(model_type: str, options: dict[str, Any], scale: float) -> None:
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    model = tiny_model("causal-lm", model_type, **options)
    head = OutputHead(model, "it")
    assert (head.scale, head.softcap) == (pytest.approx(scale, rel=1e-7), None)
    ids = torch.randint(3, 300, (3, 7))
    with torch.no_grad():
        torch.testing.assert_close(logits_of(head, model, ids), model(input_ids=ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_measures_no_worse(dtype: torch.dtype) -> None:
    head = OutputHead(tiny_model("causal-lm", "granite", logits_scaling=6.0).to(dtype), "it")
    assert head.scale == pytest.approx(1 / 6, rel=1e-7)
    head = OutputHead(tiny_model("causal-lm", "gemma2", final_logit_softcapping=3.3).to(dtype), "it")
    assert (head.scale, head.softcap) == (1, pytest.approx(3.3, rel=1e-7))


def _in_place(logits: torch.Tensor) -> torch.Tensor:
    return logits.mul_(0.5).div_(7.0).tanh_().mul_(7.0)


@pytest.mark.parametrize("change", [lambda z: 7 * (z * 0.5 / 7).tanh(), _in_place])
def test_a_factor_within_a_cap(change: Any) -> None:
    model = _Changed(tiny_bert_config()).eval()
    model.change = change
    head = OutputHead(model, "it")
    assert (head.scale, head.softcap) == (pytest.approx(0.5, rel=1e-7), 7)
    ids = torch.randint(3, 40, (3, 7))
    with torch.no_grad():
        torch.testing.assert_close(logits_of(head, model, ids), model(input_ids=ids).logits)


class _Changed(BertForMaskedLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = self.change(output.logits)
        return output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z: 30 * (z / 30).atan(), "changes its logits behind its output embeddings"),
        (lambda z: 30 * (z / 30).tanh().clamp(max=0.9), "changes its logits behind its output embeddings"),
        (lambda z: z.clamp(max=20), "changes its logits behind its output embeddings"),
        (lambda z: z.clamp(-50, 50), "changes its logits behind its output embeddings"),
        (lambda z: z * z.abs().mean(), "changes its logits behind its output embeddings"),
        (lambda z: z + 0.5, "adds to its logits"),
        (lambda z: z[..., :100], "does not make its logits by calling its output embeddings once"),
        (lambda z: z.softmax(-1), "adds to its logits"),
    ],
)
def test_logits_that_are_changed_behind_the_head_are_refused(change: Any, message: str) -> None:
    model = _Changed(tiny_bert_config())
    model.change = change
    with pytest.raises(ValueError, match=message):
        OutputHead(model, "it")


def test_heads_that_cannot_be_taken_off() -> None:
    with pytest.raises(ValueError, match="BertForTokenClassification has no output embeddings"):
        OutputHead(tiny_model("token-classification", "bert"), "it")
    # Its bias lies outside of the head, and is 0 before training.
    esm = tiny_model("masked-lm", "esm", mask_token_id=4)
    esm.lm_head.bias.data.zero_()
    with pytest.raises(ValueError, match="adds to its logits"):
        OutputHead(esm, "it")


def test_codes_of_the_embeddings_replace_equal_ones() -> None:
    model = tiny_model("masked-lm", "bert")
    exact, hidden = OutputHead(model, "it"), torch.randn(4, 16)
    codes = quantize_weight(model.get_output_embeddings().weight)
    assert exact.weight is model.get_output_embeddings().weight
    exact.quantize(codes)
    assert exact.weight.codes is codes.codes
    assert (exact.width, model.get_output_embeddings().weight.numel()) == (16, 0)
    torch.testing.assert_close(exact.weight.dequantize() @ hidden.T, codes.dequantize() @ hidden.T)
    for others in (None, codes._replace(codes=codes.codes + 1)):
        head = OutputHead(tiny_model("masked-lm", "bert"), "it")
        head.quantize(others)
        assert head.weight.codes is not codes.codes
        assert torch.equal(head.weight.codes, codes.codes)
