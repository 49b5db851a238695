"""What `memory.budget` makes of a training: plan, expected and measured peak, seconds a step, loss, over budgets.

    python benchmarks/bench_memory.py                                    three masked language models into one
    python benchmarks/bench_memory.py --budgets 1.5GB,2GB --json FILE
    python benchmarks/bench_memory.py --config my.yaml --budgets 4GB,8GB training.max_steps=20

Without --config: three teachers of 4 x 384 and a student of 4 x 384 over 32,000 tokens, untrained, in batches of 64
texts of up to 128 tokens. Each budget is a run of its own, in a process of its own. Bytes are those of the whole
process on a CPU (torch and its libraries are 0.6 GB of them) and of the allocator on CUDA. The loss is that of the last
step: the exact options leave it as it was, to rounding.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from cases import machine
from transformers import AutoConfig, AutoModelForMaskedLM

from amtss_fast._system.files import write_atomically
from amtss_fast.data import load_data, train_tokenizer

# The first leaves everything as it was.
BUDGETS = "64GB,2.2GB,1.9GB,1.6GB,1.4GB,1.2GB"
TEXTS_PER_ROW = 10


def make_inputs(folder: Path, vocab_size: int, width: int, layers: int, batch: int) -> dict[str, Any]:
    """A configuration, and the data and untrained teachers that it names."""
    texts = load_data("cldr_topic", languages=["en", "fr", "ur"])
    tokenizer = train_tokenizer(texts["train"]["text"], vocab_size, mask=True)
    data = folder / "data"
    data.mkdir()
    for split, n in (("train", 6 * batch), ("test", 8)):
        rows = texts[split].sort("language")
        starts = range(0, min(len(rows), n * TEXTS_PER_ROW) - TEXTS_PER_ROW + 1, TEXTS_PER_ROW)
        long = [rows[i : i + TEXTS_PER_ROW] for i in starts]
        lines = [{"text": ". ".join(part["text"]), "language": part["language"][0]} for part in long]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    encoder = {
        "model_type": "bert",
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "intermediate_size": 4 * width,
        "max_position_embeddings": 128,
        # Other micro-batches would draw other masks, and the losses would not compare.
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    for seed, name in enumerate("abc"):
        torch.manual_seed(seed)
        AutoModelForMaskedLM.from_config(AutoConfig.for_model(**encoder)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {
        "task": "masked-lm",
        "data": {"name": str(data), "label": None, "max_length": 128},
        "tokenizer": {"path": str(folder / "a")},
        "student": {"encoder": encoder},
        "teachers": [{"name": name, "path": str(folder / name)} for name in "abc"],
        "training": {
            "ce_weight": 0.5,
            "max_steps": 2,
            "per_device_train_batch_size": batch,
            "logging_steps": 1,
            "disable_tqdm": True,
            "report_to": "none",
            "save_strategy": "no",
        },
        "output_dir": "",
    }


def run_once(config: Path, budget: str, overrides: list[str]) -> dict[str, Any]:
    """The figures of one training."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        settings = [f"output_dir={output}", f"memory.budget={budget}", *overrides]
        command = [sys.executable, "-m", "amtss_fast.cli", "train", str(config), *settings]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"budget {budget}: {done.stderr[-2000:]}")
        log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
        losses = [entry["loss"] for entry in log if "loss" in entry]
        summary = next(entry for entry in log if "train_runtime" in entry)
        plan = json.loads((output / "memory.json").read_text())
        return {
            "budget": budget,
            "precision": plan["precision"],
            "micro_batch": plan["micro_batch"],
            "checkpointing": plan["checkpointing"],
            "chunk_rows": plan["chunk_rows"],
            "expected_gb": plan["expected"] / 1e9,
            "measured_gb": plan["measured"] / 1e9,
            "measured_by_expected": plan["measured"] / plan["expected"],
            "s_per_step": summary["train_runtime"] / len(losses),
            "last_loss": losses[-1],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, metavar="FILE", help="a run of your own")
    parser.add_argument("--budgets", default=BUDGETS, help="comma-separated (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=32_000, help="of the models made here (default: %(default)s)")
    parser.add_argument("--width", type=int, default=384, help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the configuration")
    args = parser.parse_args()
    about = machine()
    print(*(f"{key}: {value}" for key, value in about.items()), sep="\n")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        config = args.config
        if config is None:
            config = Path(folder) / "config.yaml"
            made = make_inputs(Path(folder), args.vocab_size, args.width, args.layers, args.batch)
            config.write_text(yaml.safe_dump(made))
        for budget in args.budgets.split(","):
            rows.append(run_once(config, budget, args.overrides))
            print(*(f"{k}={v:.6g}" if isinstance(v, float) else f"{k}={v}" for k, v in rows[-1].items()), flush=True)
    if args.json:
        size = {name: getattr(args, name) for name in ("vocab_size", "width", "layers", "batch")}
        write_atomically(args.json, json.dumps({"machine": about, **size, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
