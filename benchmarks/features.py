"""Sentence vectors of a frozen encoder, computed once and kept as arrays in a scratch folder."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from amtss_fast._system.files import publish


def sentence_vectors(
    texts: Sequence[str], encoder: str, layers: Sequence[int], cache: Path, batch_tokens: int = 4096
) -> np.ndarray:
    """Mean of the attended tokens' hidden states, [T, len(layers), H] float16, in the order of the texts.

    `layers`: 0 is the embeddings, n the output of the n-th layer; each is what an encoder cut off there would give.
    The array is found again by its texts, the encoder's name and the layers.
    """
    key = hashlib.sha256("\0".join([encoder, str(list(layers)), *texts]).encode()).hexdigest()[:16]
    file = cache / f"{key}.npy"
    if file.is_file():
        stored: np.ndarray = np.load(file, mmap_mode="r")
        return stored
    tokenizer = AutoTokenizer.from_pretrained(encoder, trust_remote_code=False)
    model = AutoModel.from_pretrained(encoder, use_safetensors=True, trust_remote_code=False).float().eval()
    ids = tokenizer(list(texts), truncation=True, max_length=min(128, tokenizer.model_max_length))["input_ids"]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    vectors = np.empty((len(texts), len(layers), model.config.hidden_size), dtype=np.float16)
    started, done = time.time(), 0
    while done < len(order):
        rows = order[done : done + max(1, batch_tokens // len(ids[order[done]]))]
        batch = tokenizer.pad({"input_ids": [ids[i] for i in rows]}, return_tensors="pt")
        with torch.inference_mode():
            states = model(**batch, output_hidden_states=True).hidden_states
        mask = batch["attention_mask"].unsqueeze(-1)
        for place, layer in enumerate(layers):
            vectors[rows, place] = ((states[layer] * mask).sum(1) / mask.sum(1)).half().numpy()
        done += len(rows)
        print(f"\rencoding {done:,} of {len(texts):,} texts, {time.time() - started:.0f} s", end="", flush=True)
    print()
    cache.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial.npy")
    np.save(partial, vectors)
    publish(partial, file)
    return vectors
