"""What `chaos.py` disturbs: commands in processes of their own, a tiny run left alone, and a small disk."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

SECONDS = 120.0
NAMES = ("neg", "pos")
TINY = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY |= {"intermediate_size": 24, "max_position_embeddings": 32}
TRAINING = {
    "max_steps": 10,
    "save_steps": 2,
    "logging_steps": 1,
    # A step too many would change nothing at a learning rate that has come down to 0.
    "lr_scheduler_type": "constant",
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 4,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
}
# A stage of `train`: its name, its first trace in the folder of the run, and the trace of its end.
STAGES = (
    ("before the first training", "", "training/fresh"),
    ("a teacher's training", "training/fresh", "teachers/fresh"),
    ("the student's training", "training/student", "student"),
    ("a checkpoint", "training/student/checkpoint-*", "training/student/checkpoint-*/trainer_state.json"),
    ("the student's saving", "student.partial", "student"),
    ("training on labels alone", "training/labels-only", "labels-only"),
    ("evaluation and report", "labels-only", "."),
)


class Child:
    """A command in a process of its own, forked from this one or started; it leads a group of processes."""

    def __init__(self, place: Path, arguments: Sequence[str] | Callable[[], Any], launcher: Sequence[str] = ()) -> None:
        self.status: int | None = None
        self._said = place.with_name(f"{place.name}.said")
        sys.stdout.flush()
        with open(self._said, "wb") as stream:
            if launcher and not callable(arguments):
                command = [*launcher, *arguments]
                self.pid = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True).pid
                return
            self.pid = os.fork()
            if self.pid == 0:
                os.setsid()
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
                os._exit(_in_the_child(arguments))

    def ended(self) -> bool:
        if self.status is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if found else None
        return self.status is not None

    def wait(self, seconds: float = SECONDS) -> int:
        """The exit status, negative for a signal; what does not end is killed."""
        until = time.monotonic() + seconds
        while not self.ended():
            if time.monotonic() > until:
                os.killpg(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise TimeoutError(f"no end within {seconds:.0f} s; it said:\n{self.said()}")
            time.sleep(0.002)
        assert self.status is not None
        return self.status

    def reaches(self, place: Path, trace: str) -> bool:
        """Waits for a file of this pattern; False if the command has ended before."""
        until = time.monotonic() + SECONDS
        while not (trace == "" or exists(place, trace)):
            if self.ended():
                return False
            if time.monotonic() > until:
                raise TimeoutError(f"{trace} does not come; it said:\n{self.said()}")
            time.sleep(0.0005)
        return True

    def speaks(self) -> None:
        """Waits for its first words, or for its end."""
        while not (self.ended() or self.said()):
            time.sleep(0.0005)

    def send(self, number: signal.Signals, delay: float) -> bool:
        """Sends a signal after so many seconds; False if the command has ended before."""
        time.sleep(delay)
        if self.ended():
            return False
        os.kill(self.pid, number)
        return True

    def said(self) -> str:
        return self._said.read_text(errors="replace")


def _in_the_child(arguments: Sequence[str] | Callable[[], Any]) -> int:
    try:
        # A job in the background ignores Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if callable(arguments):
            arguments()
            return 0
        from amtss_fast.cli import main

        return main(list(arguments))
    except SystemExit as stop:
        return int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def exists(place: Path, trace: str) -> bool:
    return any(True for _ in place.glob(trace)) if "*" in trace else (place / trace).exists()


def content(folder: Path) -> dict[str, str]:
    """Every file of a folder, as a digest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def bits(run: Path) -> dict[str, str]:
    """What must be the same in every finished run: weights, tokenizer, scores, losses."""
    kept = ("student", "labels-only", "teachers")
    found = {name: digest for name, digest in content(run).items() if name.split("/")[0] in kept}
    # Arguments of the training, a pickle with the name of its folder.
    found = {name: digest for name, digest in found.items() if not name.endswith("training_args.bin")}
    metrics = json.loads((run / "metrics.json").read_text())
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = {entry["step"]: entry["loss"] for entry in log if "loss" in entry}
    return found | {"metrics.json": json.dumps(metrics["test"]), "log.jsonl": json.dumps(losses)}


def differing(there: dict[str, str], here: dict[str, str]) -> list[str]:
    return sorted(name for name in {*there, *here} if there.get(name) != here.get(name))


@dataclass
class Site:
    """A folder with the data, the configuration, and what the undisturbed run left."""

    path: Path
    spans: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Of each trace: when it appeared first and last, in seconds after the start."""
    reference: dict[str, str] = field(default_factory=dict)

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def finished(self) -> Path:
        return self.path / "finished"

    def train(self, run: Path, *more: str, launcher: Sequence[str] = (), log: Path | None = None) -> Child:
        return Child(log or run, ["train", str(self.config), f"output_dir={run}", *more], launcher)

    def prepare(self) -> None:
        rows = [
            {"text": f"text {i} is {NAMES[i % 2]}", "label": NAMES[i % 2], "language": ("en", "sw")[i // 2 % 2]}
            for i in range(64)
        ]
        data = self.path / "data"
        data.mkdir(parents=True)
        new = [row | {"language": "xh", "text": f"{row['text']} xh"} for row in rows[:24]]
        for name, listed in (("train", rows), ("validation", rows[:16]), ("test", rows[16:48])):
            (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))
        (self.path / "xh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in new))
        teachers = [
            {"name": "fresh", "model": {"encoder": TINY}, "languages": ["en"]},
            {"name": "t", "path": str(self.path / "teacher")},
        ]
        values = {
            "data": {"name": str(data), "max_length": 16, "labelled_fraction": 0.5},
            "tokenizer": {"vocab_size": 400},
            "student": {"encoder": TINY},
            "teachers": teachers,
            "labels_only": True,
            "training": TRAINING,
            "teacher_training": TRAINING,
        }
        self.config.write_text(yaml.safe_dump(values))
        assert Child(self.path / "teacher", lambda: _make_teacher(self.path / "teacher", data)).wait() == 0

    def observe(self) -> None:
        """The undisturbed run: its bits, and when its traces appeared."""
        traces = {trace for stage in STAGES for trace in stage[1:]} - {"", "."}
        child, started = self.train(self.finished), time.monotonic()
        seen: dict[str, dict[str, float]] = {trace: {} for trace in traces}
        while not child.ended():
            now = time.monotonic() - started
            for trace in traces:
                for path in self.finished.glob(trace):
                    seen[trace].setdefault(str(path), now)
            time.sleep(0.001)
        if child.status != 0:
            raise RuntimeError(f"the undisturbed run fails:\n{child.said()}")
        self.spans = {t: (min(at.values()), max(at.values())) for t, at in seen.items() if at}
        self.spans |= {"": (0.0, 0.0), ".": (time.monotonic() - started,) * 2}
        self.reference = bits(self.finished)

    def span(self, start: str, end: str) -> float:
        """How long a stage takes; traces that come too fast to be seen give a short time."""
        if start not in self.spans or end not in self.spans:
            return 0.02
        return max(0.005, self.spans[end][0] - self.spans[start][0])


def _make_teacher(folder: Path, data: Path) -> None:
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    from amtss_fast.data import train_tokenizer

    texts = [json.loads(line)["text"] for line in (data / "train.jsonl").read_text().splitlines()]
    tokenizer = train_tokenizer(texts, 400)
    torch.manual_seed(1)
    labels: dict[str, Any] = {"id2label": dict(enumerate(NAMES)), "label2id": {n: i for i, n in enumerate(NAMES)}}
    sizes: dict[str, Any] = {key: value for key, value in TINY.items() if key != "model_type"}
    config = BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **labels, **sizes)
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    """A tmpfs of 32 MB."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(place)], check=True, capture_output=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def has_small_disks() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            with small_disk(Path(folder) / "disk"):
                return True
        except (subprocess.CalledProcessError, FileNotFoundError):
            return False


def fill(disk: Path, leave: int) -> Path:
    """Fills a disk but for so many bytes."""
    ballast = disk / "ballast"
    with open(ballast, "wb", buffering=0) as stream:
        try:
            while True:
                stream.write(bytes(1 << 16))
        except OSError:
            stream.truncate(max(0, stream.tell() - leave))
    return ballast
