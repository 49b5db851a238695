"""Teachers that take turns on a device. Here the device is the CPU: the copies are real, the streams are recorded."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_teachers import make_batch, make_pool
from tiny import tiny_teacher
from torch import nn

from amtss_fast.runs import distil
from amtss_fast.runs.config import load_config
from amtss_fast.teachers import Residence, TeacherPool, load_teacher, residence
from amtss_fast.teachers.int8 import why_missing

CPU = torch.device("cpu")


class Model(nn.Module):
    """Weights of two types, an int64 buffer, a weight used twice, and odd sizes."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(7, 5 + seed)
        self.narrow = nn.Parameter(torch.randn(3, 5 + seed, dtype=torch.bfloat16))
        self.again = self.first.weight
        self.register_buffer("places", torch.arange(3).flip(0))
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.first(x) + x @ self.again.T) @ self.narrow.T.float()[:, self.places]


class Streams:
    """What :mod:`torch.cuda` has of streams; knows what has happened for certain before each step."""

    def __init__(self) -> None:
        self.count = itertools.count()
        self.known: dict[str, set[int]] = defaultdict(set)
        self.current = "default"
        self.copies = 0

    def do(self, stream: str) -> int:
        """A step enqueued in a stream."""
        step = next(self.count)
        self.known[stream].add(step)
        return step

    def module(self, device: torch.device) -> Any:
        streams, names = self, itertools.count()

        class Stream:
            def __init__(self, device: torch.device) -> None:
                self.name = f"stream {next(names)}"

            def wait_event(self, event: Any) -> None:
                streams.known[self.name] |= event.seen

            def wait_stream(self, other: Any) -> None:
                streams.known[self.name] |= streams.known[other.name]

        class Event:
            def __init__(self) -> None:
                self.seen: set[int] = set()

            def record(self, stream: Any) -> None:
                self.seen = set(streams.known[stream.name])

        @contextmanager
        def stream(to: Any) -> Any:
            before, streams.current = streams.current, to.name
            yield
            streams.current = before

        default = Stream(device)
        default.name = "default"
        return SimpleNamespace(Stream=Stream, Event=Event, stream=stream, current_stream=lambda device: default)


@pytest.mark.parametrize("resident", [1, 2, 3])
def test_each_works_with_its_own_weights_and_waits_for_them(monkeypatch: pytest.MonkeyPatch, resident: int) -> None:
    streams = Streams()
    module = streams.module(CPU)
    monkeypatch.setattr(residence.torch, "get_device_module", lambda device: module)
    models, originals = ([Model(seed) for seed in range(4)] for _ in range(2))
    compute = module.Stream(CPU)
    held = Residence(models, ["a", "b", "c", "d"], CPU, resident, compute)
    lay, brought, uses = residence._lay, {}, defaultdict(list)

    def watched_lay(tensors: Any, block: torch.Tensor) -> None:
        lay(tensors, block)
        slot = next((i for i, slot in enumerate(held._slots) if slot is block), None)
        if slot is not None:
            copies = held._copies.name
            # Nothing is written where a model may still be at work.
            assert set(uses[slot]) <= streams.known[copies]
            # The step before the event of its arrival, for all that waits for that.
            brought[slot] = max(held._arrived[slot].seen, default=None)

    def copied(*args: Any, **kwargs: Any) -> Any:
        streams.do(streams.current)
        streams.copies += 1
        return copy(*args, **kwargs)

    copy = torch.Tensor.copy_
    monkeypatch.setattr(residence, "_lay", watched_lay)
    monkeypatch.setattr(torch.Tensor, "copy_", copied)
    x, rng = torch.randn(6, 7), random.Random(0)
    for _ in range(30):
        wanted = rng.sample(range(4), rng.randint(0, 4))
        done = []
        for k in held.turns(wanted):
            slot = held._holds.index(k)
            assert brought[slot] in streams.known[compute.name]
            uses[slot].append(streams.do(compute.name))
            assert torch.equal(models[k](x), originals[k](x))
            done.append(k)
        assert sorted(done) == sorted(wanted)
    # All rounds of all four cost the copies of those that are not there.
    list(held.turns(range(4)))
    streams.copies = 0
    for _ in range(3):
        list(held.turns(range(4)))
    assert streams.copies == 3 * (4 - resident)
    # Whether it is there or waits, a model is whole.
    assert all(torch.equal(model(x), original(x)) for model, original in zip(models, originals, strict=True))


def test_the_next_one_arrives_while_the_present_one_works() -> None:
    held = Residence([Model(seed) for seed in range(3)], ["a", "b", "c"], CPU, 2, torch.cpu.Stream())
    seen = [(k, sorted(i for i in held._holds if i is not None)) for k in held.turns([0, 1, 2])]
    assert seen == [(0, [0, 1]), (1, [1, 2]), (2, [1, 2])]
    assert list(held.turns([0, 1, 2])) == [1, 2, 0]


@pytest.mark.parametrize("resident", [1, 2])
def test_a_pool_whose_teachers_take_turns(tmp_path: Path, resident: int) -> None:
    folders = [tiny_teacher(tmp_path / name, seed=seed) for seed, name in enumerate("abc")]
    options: list[dict[str, Any]] = [{"precision": "bfloat16"}, {"languages": ["sw", "ur"]}, {}]
    plain, turns = (make_pool(*(load_teacher(f, **o) for f, o in zip(folders, options, strict=True))) for _ in range(2))
    # What the constructor does on CUDA.
    turns._take_turns(CPU, resident)
    for ids in (torch.tensor([0, 2, 1, 4]), torch.tensor([0, 1]), torch.tensor([2, 2, 4])):
        batch = make_batch(ids)
        for a, b in zip(plain.logits(batch), turns.logits(batch), strict=True):
            assert torch.equal(a, b)
        with torch.inference_mode():
            assert torch.equal(plain.logits(batch)[0], turns.logits(batch)[0])
    assert repr(plain) == repr(turns)


def test_what_cannot_take_turns(tmp_path: Path) -> None:
    folders = [tiny_teacher(tmp_path / name) for name in "ab"]
    loaded = [load_teacher(folder) for folder in folders]
    with pytest.raises(ValueError, match="teachers take turns on a CUDA device, got resident=1 with device=cpu"):
        make_pool(*loaded, resident=1, device="cpu")
    with pytest.raises(ValueError, match="resident and device belong together, got resident=1 and device=None"):
        make_pool(*loaded, resident=1)
    for resident in (0, 2):
        with pytest.raises(ValueError, match=f"resident must be 1 to 1 with 2 teachers, got {resident}"):
            make_pool(*loaded)._take_turns(CPU, resident)


@pytest.mark.skipif(why_missing("onednn") is not None, reason="no onednn")
def test_8_bits_do_not_take_turns(tmp_path: Path) -> None:
    loaded = [load_teacher(tiny_teacher(tmp_path / p), precision=p) for p in ("float32", "int8")]
    with pytest.raises(ValueError, match=r"teacher 'int8' has weights in a form of their own, as in 8 bits"):
        make_pool(*loaded)._take_turns(CPU, 1)


def test_a_run_without_a_gpu_refuses(tmp_path: Path) -> None:
    settings = [f"output_dir={tmp_path / 'run'}", "training.use_cpu=true", "teachers_resident=1"]
    with pytest.raises(ValueError, match="teachers_resident = 1 is for GPUs, this run is on cpu"):
        distil(load_config("demo", settings))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"teachers_resident moves teachers in float32 and bfloat16, .* is in int8"):
        load_config("demo", [*settings, "teachers.0.precision=int8"])


def test_the_student_runs_between_question_and_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA that is when the teachers' stream works: it waits for the inputs, and the loss waits for it."""
    streams = Streams()
    module = streams.module(CPU)
    pool = make_pool(load_teacher(tiny_teacher(tmp_path)))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    pool.teachers[0].model.register_forward_hook(lambda *_: work.append(streams.do(streams.current)))
    work: list[int] = []
    inputs = streams.do("default")
    finish = pool.ask(make_batch())
    assert inputs in streams.known[streams_name(pool)]
    student = streams.do("default")
    assert student not in streams.known[streams_name(pool)]
    assert len(work) == 1
    assert work[0] not in streams.known["default"]
    finish()
    assert work[0] in streams.known["default"]


def streams_name(pool: TeacherPool) -> str:
    name: str = pool._streams.of(CPU).name
    return name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("resident", [1, 2])
def test_turns_on_cuda(tmp_path: Path, resident: int) -> None:
    size = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
    folders = [tiny_teacher(tmp_path / name, seed=seed, **size) for seed, name in enumerate("abc")]
    plain = make_pool(*(load_teacher(f, device="cuda") for f in folders))
    before = torch.cuda.memory_allocated()
    turns = make_pool(*(load_teacher(f) for f in folders), resident=resident, device="cuda")
    footprint = turns.teachers[0].memory_footprint()
    assert torch.cuda.memory_allocated() - before < 1.1 * resident * footprint
    batch = {name: v.cuda() if isinstance(v, torch.Tensor) else v for name, v in make_batch().items()}
    for _ in range(20):
        for a, b in zip(plain.logits(batch), turns.logits(batch), strict=True):
            assert torch.equal(a, b)
    # Outside of a turn they wait on the CPU, whole.
    assert sum(t.device.type == "cuda" for t in turns.teachers) == resident
