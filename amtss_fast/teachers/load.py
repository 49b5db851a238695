"""Loading of teachers from checkpoints, in the precision asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from amtss_fast.errors import UserError
from amtss_fast.models.checkpoints import load_model
from amtss_fast.models.places import read_model_config
from amtss_fast.models.tokenizers import load_tokenizer
from amtss_fast.teachers import int8
from amtss_fast.teachers.fitness import check_head, check_padding
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
        UserError: an unknown precision, task or engine; a checkpoint that is broken, that no name belongs to, whose
            weights and configuration do not fit, or that is no classifier or language model of softmax outputs; no
            tokenizer given and none beside the model; int8 for a model without layers for it; as :class:`Teacher`.
        FileNotFoundError: a path without a folder.
        TypeError: as :class:`Teacher`.
        ImportError: an engine or a package that is missing.
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
    name = Path(name_or_path).expanduser().resolve().name if name is None else name
    whose = f"teacher {name!r}"
    if task in ("sequence-classification", "token-classification"):
        check_head(read_model_config(name_or_path, whose=whose), name, task, label_names)
    kind = TASK_MODELS[task]
    # Shapes and names of all weights, from the files' headers.
    skeleton: PreTrainedModel = load_model(kind, name_or_path, whose=whose, dry=True)
    if engine is not None:
        share = int8.share_in_8_bits(skeleton, f"{whose} ({name_or_path})")
        model = load_model(kind, name_or_path, whose=whose, **int8.loading_options(engine, place, skeleton))
        int8.quantize_embedding(model)
        int8.leave_file(model)
        precision = f"int8 ({engine})" if share >= 0.5 else f"int8 ({engine}, {share:.0%} of the weights)"
    else:
        options = {"dtype": getattr(torch, precision)}
        model = nn.Module.to(load_model(kind, name_or_path, whose=whose, **options), place)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        of = whose if tokenizer is None else f"{whose}: tokenizer"
        tokenizer = load_tokenizer(name_or_path if tokenizer is None else tokenizer, whose=of)
    teacher = Teacher(
        model,
        name=name,
        tokenizer=tokenizer,
        languages=languages,
        prior=prior,
        label_names=label_names,
        max_length=max_length,
        precision=precision,
        compile=compile,
    )
    if task == "sequence-classification":
        check_padding(teacher)
    return teacher
