"""Output heads as hidden states, matrix and bias."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_bert_config
from tiny_tokens import tiny_model
from transformers import BertForMaskedLM

from amtss_fast import quantize_weight
from amtss_fast.models import OutputHead


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
