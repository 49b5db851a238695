"""What one teacher costs in each precision and engine, and what fewer bits change.

    python benchmarks/bench_teachers.py                      speed and memory, 12 layers x 768, 24 x 72 tokens
    python benchmarks/bench_teachers.py --layers 4 --vocabulary 30000 --engines float32,native
    python benchmarks/bench_teachers.py --fidelity intfloat/multilingual-e5-small
    python benchmarks/bench_teachers.py --json FILE

Speed: an encoder of XLM-R's shape with random weights and a batch of 24 rows of 72 tokens; once all 72 are words, once
rows have 72, 70, ... 26 words and the rest is padding. Engines run in processes of their own, several rounds in turn;
figures are medians over all calls. `torch-dynamic` is torch.ao's dynamic quantization as it comes, one step for all
tokens of a batch. Memory: bytes of weights, and the largest anonymous resident set while loading beyond that of the
process before (pages of the mapped checkpoint are not counted: the system may drop them).

Fidelity: a sentence encoder (a folder or Hub id) with a classifier trained here on its frozen vectors of cldr_topic's
training texts, then KL(float32 || engine) and the share of equal most likely classes on its test texts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from cases import machine
from torch import Tensor
from transformers import AutoTokenizer, XLMRobertaConfig, XLMRobertaForSequenceClassification

from amtss_fast import AMTSSForSequenceClassification, Teacher, load_teacher
from amtss_fast._system.files import write_atomically
from amtss_fast.data import load_data
from amtss_fast.teachers.precision import compare

ENGINES = (
    "float32",
    "float32-compile",
    "bfloat16",
    "native",
    "native-compile",
    "onednn",
    "onednn-compile",
    "torch-dynamic",
    "bitsandbytes",
    "torchao",
    "torchao-compile",
)
N, T = 24, 72


def load(folder: str, engine: str) -> Teacher:
    name, _, compiled = engine.partition("-")
    if engine == "torch-dynamic":
        teacher = load_teacher(folder)
        torch.backends.quantized.engine = "onednn"
        model = torch.ao.quantization.quantize_dynamic(teacher.model, {torch.nn.Linear}, dtype=torch.qint8)
        return Teacher(model, name=engine, tokenizer=teacher.tokenizer, precision=engine)
    if name in ("float32", "bfloat16"):
        return load_teacher(folder, precision=name, compile=bool(compiled))
    return load_teacher(folder, precision="int8", engine=name, compile=bool(compiled))


def make_batch(vocabulary: int, padded: bool) -> dict[str, Tensor]:
    ids = torch.randint(5, vocabulary, (N, T), generator=torch.Generator().manual_seed(0))
    lengths = T - 2 * torch.arange(N) if padded else torch.full((N,), T)
    mask = (torch.arange(T) < lengths.unsqueeze(1)).long()
    return {"input_ids": ids.where(mask.bool(), torch.ones_like(ids)), "attention_mask": mask}


def resident() -> tuple[int, int]:
    """Bytes of anonymous memory, and with the pages of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    anonymous, everything = (
        1024 * int(next(line for line in lines if line.startswith(name)).split()[1]) for name in ("RssAnon", "VmRSS")
    )
    return anonymous, everything


class Peak(threading.Thread):
    """The largest resident set while it runs, beyond that at its start: anonymous, and with mapped files."""

    def __enter__(self) -> Peak:
        self._before, self.bytes, self.with_files, self._done = resident(), 0, 0, threading.Event()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()

    def run(self) -> None:
        while not self._done.wait(0.002):
            anonymous, everything = resident()
            self.bytes = max(self.bytes, anonymous - self._before[0])
            self.with_files = max(self.with_files, everything - self._before[1])


def one_engine(folder: str, engine: str, vocabulary: int, seconds: float) -> dict[str, Any]:
    """Called in a process of its own."""
    with Peak() as peak:
        teacher = load(folder, engine)
    result: dict[str, Any] = {"load_peak": peak.bytes, "weights": footprint(teacher), "times": {}}
    for padded in (False, True):
        batch = make_batch(vocabulary, padded)
        # Where no row is padded, float32 is the bare model: a teacher pads to a multiple of 16 tokens.
        ask = torch.inference_mode()(teacher.model) if engine == "float32" and not padded else teacher.logits
        started = time.perf_counter()
        ask(**batch)
        first = time.perf_counter() - started
        result.setdefault("first_seconds", first)
        times: list[float] = []
        until = time.perf_counter() + seconds
        while time.perf_counter() < until or len(times) < 2:
            started = time.perf_counter()
            ask(**batch)
            times.append(time.perf_counter() - started)
            if times[-1] > seconds:
                break
        result["times"]["padded" if padded else "full"] = times
    return result


def footprint(teacher: Teacher) -> int:
    """Bytes of weights, those too that torch's own quantized layers keep out of sight."""
    hidden = 0
    for module in teacher.model.modules():
        if type(module).__module__.startswith("torch.ao"):
            weight, bias = module._weight_bias()
            hidden += weight.numel() + 4 * len(bias)
    return teacher.memory_footprint() + hidden


def speed(args: argparse.Namespace, engines: list[str]) -> list[dict[str, Any]]:
    found: dict[str, list[dict[str, Any]]] = {engine: [] for engine in engines}
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, args.layers, args.vocabulary)
        for _ in range(args.rounds):
            for engine in engines:
                command = [
                    sys.executable,
                    __file__,
                    "--one",
                    engine,
                    "--folder",
                    folder,
                    "--seconds",
                    str(args.seconds),
                ]
                command += ["--vocabulary", str(args.vocabulary)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise RuntimeError(f"{engine}: {done.stderr[-2000:]}")
                found[engine].append(json.loads(done.stdout.splitlines()[-1]))
    base = found[engines[0]]
    rows = []
    for engine, runs in found.items():
        row: dict[str, Any] = {"engine": engine}
        for kind in ("full", "padded"):
            times, own = ([t for run in r for t in run["times"][kind]] for r in (base, runs))
            row[f"{kind}_ms"] = 1e3 * statistics.median(own)
            row[f"{kind}_speedup"] = statistics.median(times) / statistics.median(own)
        row["first_s"] = statistics.median(run["first_seconds"] for run in runs)
        row["weights_mb"] = runs[0]["weights"] / 1e6
        row["weights_share"] = runs[0]["weights"] / base[0]["weights"]
        row["load_peak_mb"] = max(run["load_peak"] for run in runs) / 1e6
        rows.append(row)
    return rows


def save_model(folder: str, layers: int, vocabulary: int) -> None:
    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=vocabulary,
        hidden_size=768,
        num_hidden_layers=layers,
        num_attention_heads=12,
        intermediate_size=3072,
        max_position_embeddings=514,
        type_vocab_size=1,
        id2label={0: "a", 1: "b", 2: "c"},
    )
    XLMRobertaForSequenceClassification(config).save_pretrained(folder)
    save_tokenizer(folder)


def save_tokenizer(folder: str) -> None:
    """Some tokenizer: the ids of this benchmark are drawn."""
    from amtss_fast.data import train_tokenizer

    tokenizer = train_tokenizer(["a b c"], 400)
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(folder)


def fidelity(encoder: str, engines: list[str], n_train: int, n_test: int) -> list[dict[str, Any]]:
    data = load_data("cldr_topic", languages=["en", "de", "ru", "ar", "zh", "hi", "sw", "tr"])
    names = data["train"].features["label"].names
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    torch.manual_seed(0)
    train = data["train"].shuffle(seed=0).select(range(n_train))
    test = data["test"].shuffle(seed=0).select(range(n_test))
    model = AMTSSForSequenceClassification.from_encoder(encoder, languages=["all"], id2label=names).eval()

    def batches(rows: Any) -> list[dict[str, Tensor]]:
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["text"]))
        texts = [rows[i]["text"] for i in order]
        labels = [rows[i]["label"] for i in order]
        result = []
        for i in range(0, len(rows), 32):
            batch = dict(
                tokenizer(texts[i : i + 32], padding=True, truncation=True, max_length=64, return_tensors="pt")
            )
            batch["labels"] = torch.tensor(labels[i : i + 32])
            batch["language_ids"] = torch.zeros(len(batch["labels"]), dtype=torch.long)
            result.append(batch)
        return result

    vectors: list[Tensor] = []
    hook = model.projections[0].register_forward_pre_hook(lambda module, inputs: vectors.append(inputs[0].detach()))
    train_batches = batches(train)
    with torch.no_grad():
        for batch in train_batches:
            model(**{k: v for k, v in batch.items() if k != "labels"})
    hook.remove()
    x, y = torch.cat(vectors), torch.cat([b["labels"] for b in train_batches])
    head = [*model.projections.parameters(), *model.classifiers.parameters()]
    optimizer = torch.optim.AdamW(head, lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model.classifiers[0](model.projections[0](x)), y)
        loss.backward()
        optimizer.step()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        test_batches = batches(test)
        labels = torch.cat([b["labels"] for b in test_batches])
        exact = None
        for engine in engines:
            teacher = load(folder, engine)
            logits = torch.cat([teacher.logits(**batch) for batch in test_batches]).float()
            exact = logits if exact is None else exact
            kl, same = compare(exact, logits)
            rows.append(
                {
                    "engine": engine,
                    "accuracy": float((logits.argmax(-1) == labels).float().mean()),
                    "mean_kl": float(kl.mean()),
                    "largest_kl": float(kl.max()),
                    "agreement": float(same.double().mean()),
                    "mean_probability_change": float((exact.softmax(-1) - logits.softmax(-1)).abs().mean()),
                    "rows": len(labels),
                    "weights_mb": footprint(teacher) / 1e6,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default=",".join(ENGINES), help=f"of {', '.join(ENGINES)} (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=250_002)
    parser.add_argument("--seconds", type=float, default=6, help="per engine, round and batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--fidelity", metavar="ENCODER", help="measure fidelity in place of speed")
    parser.add_argument("--train-rows", type=int, default=3000)
    parser.add_argument("--test-rows", type=int, default=1500)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one_engine(args.folder, args.one, args.vocabulary, args.seconds)))
        return
    engines = args.engines.split(",")
    if engines[0] != "float32" or not set(engines) <= set(ENGINES):
        parser.error(f"--engines must begin with float32 and be among {', '.join(ENGINES)}")
    about = machine()
    print(*(f"{key}: {value}" for key, value in about.items()), sep="\n")
    if args.fidelity:
        part, rows = "fidelity", fidelity(args.fidelity, engines, args.train_rows, args.test_rows)
    else:
        part, rows = "speed", speed(args, engines)
    columns = list(rows[0])
    print("\n" + " ".join(f"{name:>16}" for name in columns))
    for row in rows:
        print(" ".join(f"{row[c]:16.4g}" if isinstance(row[c], float) else f"{row[c]!s:>16}" for c in columns))
    if args.json:
        known = json.loads(args.json.read_text()) if args.json.exists() else {}
        shape = {"layers": args.layers, "width": 768, "vocabulary": args.vocabulary, "batch": [N, T]}
        source = {"encoder": Path(args.fidelity).name} if args.fidelity else shape
        # Engines measured before are kept: each is compared with the float32 of its own run.
        kept = [row for row in known.get(part, {}).get("rows", []) if row["engine"] not in engines]
        known[part] = {"machine": about, **source, "rows": [*rows, *kept]}
        write_atomically(args.json, json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
