"""Loading of teachers from checkpoints, in the precision asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from amtss_fast.errors import UserError
from amtss_fast.models.tokenizers import load_tokenizer
from amtss_fast.teachers import int8
from amtss_fast.teachers.teacher import Teacher

PRECISIONS = ("float32", "bfloat16", "int8")
"""From exact to approximate."""
TASK_MODELS = {
    "sequence-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "masked-lm": AutoModelForMaskedLM,
    "causal-lm": AutoModelForCausalLM,
}
"""The class that loads the models of each task."""


def load_teacher(
    name_or_path: str | Path,
    *,
    precision: str = "float32",
    engine: str | None = None,
    compile: bool = False,
    languages: Sequence[str] | None = None,
    prior: float = 1.0,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    device: torch.device | str | None = None,
    label_names: Sequence[str] | None = None,
    max_length: int | None = None,
    name: str | None = None,
    task: str = "sequence-classification",
) -> Teacher:
    """Loads a fine-tuned classifier or language model (safetensors only) as a teacher.

    Args:
        name_or_path: a Hub id or a folder, also of an AMTSS student.
        precision: `"float32"` or `"bfloat16"`, of all parameters; or `"int8"`: linear layers of the encoder and word
            embeddings in 8 bits, quantized one at a time as they are read. `amtss-fast teachers check` measures how
            much this changes a teacher.
        engine: what runs int8: `"native"` (CPUs with AVX-512 VNNI), `"onednn"` (x86 CPUs), `"bitsandbytes"` or
            `"torchao"` (packages of that name); default: bitsandbytes on CUDA; on CPUs native, else onednn.
        compile: run it through `torch.compile` (needs a C++ compiler on CPUs): one compilation for all shapes, of
            half a minute or more at the first call.
        languages: codes that it teaches; default: all (an AMTSS student: all of its own).
        prior: its weight before the margins are applied, at least 0; 0 excludes it.
        tokenizer: a tokenizer, or its folder or Hub id; default: the one saved with the model.
        device: default: the CPU.
        label_names: the names of its outputs in order, where the checkpoint's are LABEL_0, ... or
            in other words than the student's.
        max_length: the most tokens per row when it reads texts; default: the tokenizer's `model_max_length`, bounded
            by the model's positions.
        name: its name in messages and reports; default: the last part of `name_or_path`.
        task: `"sequence-classification"`, `"token-classification"`, `"masked-lm"` or `"causal-lm"`.

    Raises:
        UserError: an unknown precision, task or engine; a checkpoint without a trained head; as :class:`Teacher`.
        TypeError: as :class:`Teacher`.
        RuntimeError: no tokenizer given and none beside the model.
        ImportError: an engine that is missing.
        OSError: nothing found under that name, or no safetensors file.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    if task not in TASK_MODELS:
        raise UserError(f"task must be one of {', '.join(TASK_MODELS)}; got {task!r}")
    if engine is not None and precision != "int8":
        raise UserError(f"engine={engine!r} is for precision 'int8', not {precision!r}")
    place = torch.device("cpu" if device is None else device)
    if precision == "int8":
        engine = int8.choose_engine(engine, place)
        model = _load_in_8_bits(name_or_path, task, engine, place)
        precision = f"int8 ({engine})"
    else:
        model = nn.Module.to(_load(name_or_path, task, {"dtype": getattr(torch, precision)}), place)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer = load_tokenizer(name_or_path if tokenizer is None else tokenizer)
    return Teacher(
        model,
        name=Path(name_or_path).resolve().name if name is None else name,
        tokenizer=tokenizer,
        languages=languages,
        prior=prior,
        label_names=label_names,
        max_length=max_length,
        precision=precision,
        compile=compile,
    )


def _load_in_8_bits(name_or_path: str | Path, task: str, engine: str, device: torch.device) -> PreTrainedModel:
    with torch.device("meta"):
        skeleton = TASK_MODELS[task].from_config(AutoConfig.from_pretrained(name_or_path, trust_remote_code=False))
    model = _load(name_or_path, task, int8.loading_options(engine, device, skeleton))
    int8.quantize_embedding(model)
    int8.leave_file(model)
    return model


def _load(name_or_path: str | Path, task: str, options: dict[str, Any]) -> PreTrainedModel:
    model: PreTrainedModel
    model, info = TASK_MODELS[task].from_pretrained(
        name_or_path,
        **options,
        output_loading_info=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    # transformers only warns of missing weights, and draws them at random.
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise UserError(
            f"teacher {str(name_or_path)!r} is no fine-tuned {type(model).__name__}: "
            f"its checkpoint lacks {', '.join(missing)}"
        )
    return model
