"""Models, batches and teachers of token tasks, made on the spot."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tiny import tiny_tokenizer
from transformers import AutoConfig, PreTrainedModel

from amtss_fast.data import LanguageModelCollator
from amtss_fast.teachers import TASK_MODELS, Teacher, TokenTeachers

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
        model: PreTrainedModel = TASK_MODELS.get(task, TASK_MODELS["token-classification"]).from_config(config)
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
    # Both languages, mixed.
    rows = rows.remove_columns("language_ids").add_column("language_ids", np.arange(n) % 2)
    if task != "token-classification":
        return LanguageModelCollator(tokenizer(), task, mask_probability=0.4)(list(rows))
    batch = LanguageModelCollator(tokenizer(), "causal-lm")(list(rows))
    return batch | {"labels": batch["labels"] % 3 - (batch["input_ids"] % 7 == 0).long()}


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
