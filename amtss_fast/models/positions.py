"""How many tokens a model takes, and whether its tokens see later ones."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from amtss_fast.models.modes import eval_mode

_MOST_TOKENS = 10**9
"""transformers writes "no limit" as 1e30."""


def max_positions(config: PretrainedConfig) -> int | None:
    """The most tokens that a model of this configuration takes, found without its weights; None: no limit.

    The smaller of `max_position_embeddings` (`n_positions`) and of what its table of positions holds: where positions
    start after the padding's row (RoBERTa and related models), 514 rows hold 512 tokens. Models with rotary or relative
    positions (Llama, Qwen, ModernBERT, DeBERTa) have no table and run longer rows too; what their configuration states
    counts as a limit all the same, as they were made for no more. T5 states none.

    Args:
        config: of any model with an `AutoModel`, also of an AMTSS student.

    Raises:
        ValueError, or another error of transformers: a configuration that no model can be built from.
    """
    text_config = config.get_text_config()
    with torch.device("meta"):
        model = AutoModel.from_config(copy.deepcopy(text_config), trust_remote_code=False)
    return _limit(text_config, model)


def max_input_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The most tokens that model and tokenizer take, or None if neither has a limit.

    The smaller of the tokenizer's `model_max_length` and of :func:`max_positions`.
    """
    limits = [tokenizer.model_max_length, _limit(model.config.get_text_config(), model)]
    return min((int(limit) for limit in limits if limit is not None and limit <= _MOST_TOKENS), default=None)


def _limit(text_config: PretrainedConfig, model: nn.Module) -> int | None:
    limits: list[int] = []
    stated = getattr(text_config, "max_position_embeddings", None)
    if isinstance(stated, int) and stated > 0:
        limits.append(stated)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "position_embeddings" and isinstance(module, nn.Embedding):
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - unused)
    return min(limits, default=None)


@torch.no_grad()
def sees_later_tokens(model: PreTrainedModel, *, seed: int = 0) -> bool:
    """Whether a token's output depends on the tokens after it; of a causal language model it must not.

    Args:
        model: a language model or an encoder. Two rows of 8 random tokens, of which the last 4 differ, go through it
            one after the other, so that the arithmetic of the first 4 is the same.
        seed: of the tokens.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[index]
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(rows, (1, 8), generator=generator)
    # Another token in each of the last places, whatever was drawn.
    second = (first + 1 + torch.randint(rows - 1, (1, 8), generator=generator)) % rows
    second[:, :4] = first[:, :4]
    with eval_mode(model):
        values, others = (_early_values(model, ids.to(model.device)) for ids in (first, second))
    exact = values.dtype == torch.float32 and getattr(model.config, "quantization_config", None) is None
    # The steps of 8-bit activations may depend on all tokens.
    tolerance = 1e-6 if exact else 1e-2
    return bool((values - others).abs().max() > tolerance * values.abs().max())


def _early_values(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits, or else hidden states, of the first 4 tokens."""
    outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids), return_dict=True)
    logits = getattr(outputs, "logits", None)
    values: torch.Tensor = outputs.last_hidden_state if logits is None else logits
    return values[:, :4]
