"""How many tokens a model takes, and whether its tokens see later ones."""

from __future__ import annotations

import copy
from typing import Any

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
        model: a language model or an encoder; two rows of 8 random tokens, of which the last 4 differ, go through it.
        seed: of the tokens.
    """
    rows: Any = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(rows.weight.shape[0], (2, 8), generator=generator)
    ids[1, :4] = ids[0, :4]
    # Other tokens in each place, whatever was drawn.
    ids[1, 4:] = (ids[0, 4:] + 1 + ids[1, 4:] % (rows.weight.shape[0] - 1)) % rows.weight.shape[0]
    ids = ids.to(model.device)
    with eval_mode(model):
        outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids), return_dict=True)
    values = outputs.logits if getattr(outputs, "logits", None) is not None else outputs.last_hidden_state
    first, second = values[:, :4].float()
    return bool((first - second).abs().max() > 1e-3 * first.abs().max())
