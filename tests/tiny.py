"""Models and tokenizers small enough to make on the spot, without a network."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

TEXTS = (
    "a red apple on the table",
    "un gato duerme en la silla",
    "paka mwekundu analala chini ya meza",
    "ein Hund läuft durch den Regen",
    "کتا بارش میں بھاگتا ہے",
)
LABELS = ("entailment", "neutral", "contradiction")


def tiny_tokenizer(
    texts: Sequence[str] = TEXTS, *, vocab_size: int = 300, model_max_length: int = 64
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the texts: [CLS] a [SEP], [CLS] a [SEP] b [SEP]."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=model_max_length,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def tiny_bert_config(vocab_size: int = 300, **options: Any) -> BertConfig:
    """Two layers of width 16, with weights drawn wide so that different inputs differ clearly."""
    values: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    }
    return BertConfig(**{**values, **options})


def tiny_teacher(
    path: str | Path,
    *,
    labels: Sequence[str] = LABELS,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
    **options: Any,
) -> Path:
    """Saves an untrained BERT classifier and its tokenizer to a folder, and returns the folder."""
    tokenizer = tokenizer or tiny_tokenizer()
    config = tiny_bert_config(
        len(tokenizer),
        id2label=dict(enumerate(labels)),
        label2id={name: index for index, name in enumerate(labels)},
        **options,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertForSequenceClassification(config)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return Path(path)


def weights(trainer: Any) -> torch.Tensor:
    """All parameters of its model in one vector."""
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def run_in_two_processes(folder: Path, code: str) -> None:
    """Runs Python code in two processes of `torch.distributed`; it finds the test modules."""
    script = folder / "in_two_processes.py"
    script.write_text(f"{code}\nfrom amtss_fast._system.processes import leave_process_group\nleave_process_group()\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, [here, *(entry for entry in here.iterdir() if entry.is_dir())]))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr


def weights_of_two_processes(folder: Path, module: str, trainer: str) -> torch.Tensor:
    """The weights after training in two processes; `trainer` is an expression that makes one in a test module."""
    file = folder / "weights.pt"
    run_in_two_processes(
        folder,
        f"""
import torch
from pathlib import PosixPath
from {module} import make_trainer
from tiny import weights
trainer = {trainer}
trainer.train()
assert trainer.args.world_size == 2
if trainer.is_world_process_zero():
    torch.save(weights(trainer), {str(file)!r})
""",
    )
    saved: torch.Tensor = torch.load(file, weights_only=True)
    return saved
