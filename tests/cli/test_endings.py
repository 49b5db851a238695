"""How commands end: messages, exit statuses, signals, closed pipes."""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from amtss_fast.cli import main
from amtss_fast.errors import UserError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "demo", "--resumed"], "unrecognized arguments: --resumed"),
        (["train", "demo", "--seed=1", "output_dir=x"], "unrecognized arguments: --seed=1"),
        (["train", "demo", "--resume", "--overwrite"], "not allowed with argument"),
        (["train"], "required: config"),
        (["report", "runs/demo", "seed=1"], "unrecognized arguments: seed=1"),
        (["predict", "runs/demo", "--batch-size", "0"], "must be an integer of at least 1, got 0"),
        (["traen", "demo"], "invalid choice: 'traen'"),
        ([], "required: COMMAND"),
    ],
)
def test_mistyped_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    first, *rest = capsys.readouterr().err.splitlines()
    assert message in first
    assert first.startswith(f"amtss-fast {arguments[0]}: " if arguments and arguments[0] != "traen" else "amtss-fast: ")
    assert all(line.startswith("  ") for line in rest)


def test_only_what_the_user_can_mend_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(error: Exception) -> None:
        def raise_error(*_: Any, **options: Any) -> Path:
            raise error

        monkeypatch.setattr("amtss_fast.runs.distil", raise_error)

    for mended in (UserError("no such data"), FileNotFoundError("no such data"), ImportError("no such data")):
        fail(mended)
        assert main(["train", "demo"]) == 2
        assert capsys.readouterr().err == "amtss-fast train: no such data\n"
        with pytest.raises(type(mended)):
            main(["--trace", "train", "demo"])
    for error, line in (
        (UserError("wrong:\n  a\n\nb\n"), "wrong:\n  a\n  b"),
        (PermissionError(13, "Permission denied", "run/config.yaml"), "Permission denied: run/config.yaml"),
        (OSError(28, "No space left on device", "run"), "No space left on device: run"),
        (OSError(122, "Disk quota exceeded", "run"), "Disk quota exceeded: run"),
        (OSError(), "OSError"),
        (MemoryError(), "out of memory\n  memory.budget fits a training into the memory that there is"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp]\nDefaultCPUAllocator: can't allocate memory"),
            "out of memory: [enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory\n"
            "  memory.budget fits a training into the memory that there is",
        ),
    ):
        fail(error)
        assert main(["train", "demo"]) == 2
        assert capsys.readouterr().err == f"amtss-fast train: {line}\n"
    for bug in (ValueError("a bug"), TypeError("a bug"), RuntimeError("a bug")):
        fail(bug)
        with pytest.raises(type(bug), match="a bug"):
            main(["train", "demo"])


@pytest.mark.parametrize("name", ["demo", "train", "cache", "add-language", "report"])
@pytest.mark.parametrize(("signal_", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(
    name: str, signal_: signal.Signals, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: Any) -> None:
        os.kill(os.getpid(), signal_)
        time.sleep(10)

    monkeypatch.setattr(importlib.import_module(f"amtss_fast.cli.{name.replace('-', '_')}"), "run", run)
    arguments = {"train": ["demo"], "cache": ["demo"], "add-language": ["run", "sw"], "report": ["run"]}.get(name, [])
    before = signal.getsignal(signal.SIGTERM)
    assert main([name, *arguments]) == status
    assert signal.getsignal(signal.SIGTERM) is before
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) <= 2
    assert lines[0].startswith(f"amtss-fast {name}: {'interrupted' if status == 130 else 'terminated'}")
    goes_on = {"demo": "--resume", "train": "--resume", "cache": "same command", "add-language": "RUN is as it was"}
    assert goes_on.get(name, "") in lines[0]


def test_a_reader_that_leaves_ends_the_command_quietly() -> None:
    script = """
import sys
from amtss_fast import cli
def run(options):
    for _ in range(100_000):
        print("a line")
cli.report.run = run
sys.exit(cli.main(["report", "run"]))
"""
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.readline()
    child.stdout.close()
    assert child.stderr.read() == ""
    assert child.wait() == 141


PRINTS = """
import os, signal, sys, time
from amtss_fast import cli
from amtss_fast.errors import UserError
def run(options):
    for _ in range(100_000):
        print("a line")
def stopped(options):
    print("a line")
    sys.stdin.readline()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)
def wrong(options):
    print("a line")
    sys.stdin.readline()
    raise UserError("no such data")
cli.report.run = {}
sys.exit(cli.main(["report", "run"]))
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_outputs_that_nobody_reads(kind: str, unbuffered: str) -> None:
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    if kind == "pipe":
        here, there = os.pipe()
    else:
        ends = socket.socketpair()
        here, there = ends[0].detach(), ends[1].detach()
    command = [sys.executable, "-c", PRINTS.format("run")]
    child = subprocess.Popen(command, stdout=there, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(there)
    os.read(here, 1)
    os.close(here)
    assert child.communicate()[1] == ""
    assert child.returncode == 141


@pytest.mark.parametrize(
    ("run", "status", "line"), [("stopped", 130, "interrupted"), ("wrong", 2, "no such data")], ids=["ctrl-c", "error"]
)
def test_what_is_said_after_the_reader_of_the_output_has_gone(run: str, status: int, line: str) -> None:
    command, environment = [sys.executable, "-c", PRINTS.format(run)], os.environ | {"PYTHONUNBUFFERED": ""}
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, text=True, env=environment, **pipes) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        child.stdin.write("\n")
        child.stdin.close()
        assert child.stderr.read().strip() == f"amtss-fast report: {line}"
    assert child.returncode == status


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_that_cannot_be_written_is_one_line(unbuffered: str, tmp_path: Path) -> None:
    # No file gets larger than this.
    script = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)){PRINTS.format('run')}"
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with open(tmp_path / "out", "wb") as out:
        done = subprocess.run(
            [sys.executable, "-c", script], stdout=out, stderr=subprocess.PIPE, text=True, env=environment
        )
    assert done.stderr == "amtss-fast report: File too large\n"
    assert done.returncode == 2


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for arguments in (
        ["report", "~/run"],
        ["add-language", "~/run", "sw"],
        ["evaluate", "~/run"],
        ["predict", "~/run"],
    ):
        assert main(arguments) == 2
        assert f"{tmp_path}/run" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["thesis.txt", "thesis.txt/run", "thesis.txt/a/b"])
@pytest.mark.parametrize("command", [["train", "demo"], ["train", "demo", "--overwrite"], ["cache", "demo"]])
def test_folders_that_cannot_be(
    command: list[str], place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    folder = tmp_path / place
    assert main([*command, f"output_dir={folder}", "teacher_cache.path=cache"]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"amtss-fast {command[0]}: output_dir {folder} ")
    assert message.count("\n") == 1
    assert main(["cache", "demo", f"output_dir={tmp_path / 'run'}", f"teacher_cache.path={folder}"]) == 2
    assert f"teacher_cache.path {folder} " in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "mine"
