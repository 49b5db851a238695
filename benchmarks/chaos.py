"""Kills, signals and full disks: does a run keep its word?

    python benchmarks/chaos.py --runs 20 --seed 0

A tiny run (one teacher trained in it, one by path, the student, the same student on labels alone) is first left alone;
then it is disturbed at random moments of each stage, and finished with the command that the documentation names. What
it then holds must equal, bit for bit, what the undisturbed run holds: weights, scores, and the losses of the log.

Each row of the table is one kind of disturbance. Its moments are drawn between the first trace of the stage in the
folder and the end of the stage in the undisturbed run. Processes are forked from one that has imported everything, and
has not computed anything (OpenMP has no threads yet), so that an attempt takes a second; rows of two processes start
`torch.distributed.run` as a user does. The rows of full disks need the right to mount a tmpfs.
The exit status is 1 if a row is wrong.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from chaos_site import SECONDS, STAGES, Child, Site, bits, content, differing, fill, has_small_disks, small_disk


@dataclass
class Row:
    """A line of the table."""

    what: str
    how: str
    must: str
    once: Callable[[Site, random.Random, Path], int]
    """One run in an empty folder: the number of disturbances; raises Wrong."""
    slow: bool = False
    runs: int = 0
    hits: int = 0
    wrong: list[str] = field(default_factory=list)


class Wrong(AssertionError):
    """A run that did not keep its word."""


def expect(true: bool, what: str, child: Child | None = None) -> None:
    if not true:
        raise Wrong(what + (f"\n{child.said()[-3000:]}" if child is not None else ""))


def expect_bits(site: Site, run: Path, reference: dict[str, str] | None = None) -> None:
    differ = differing(site.reference if reference is None else reference, bits(run))
    expect(not differ, f"differ from the undisturbed run: {', '.join(differ)}")
    left = [path.name for path in run.parent.iterdir() if path.name.startswith(f"{run.name}.") and path.is_dir()]
    left += [str(path.relative_to(run)) for path in run.rglob("*.partial")]
    expect(not left, f"left behind: {', '.join(left)}")


def killed(stage: tuple[str, str, str], number: signal.Signals = signal.SIGKILL) -> Callable[..., int]:
    """Up to three times in the same stage, then finished."""

    def once(site: Site, draw: random.Random, run: Path) -> int:
        _, start, end = stage
        hits, more = 0, list[str]()
        for _ in range(draw.choice((1, 1, 2, 3))):
            trace = start.replace("*", str(draw.randrange(2, 10, 2))) if start.endswith("-*") else start
            child = site.train(run, *more)
            # Before that a signal finds Python importing, not a command.
            if number != signal.SIGKILL:
                child.speaks()
            if child.reaches(run, trace) and child.send(number, draw.uniform(0, 1.1 * site.span(start, end))):
                hits += 1
                _check_signal(child, number, "amtss-fast train", "--resume")
            more = ["--resume"]
        _finish(site, run)
        return hits

    return once


def _check_signal(child: Child, number: signal.Signals, command: str, advice: str) -> None:
    """Status and message after a signal. One that came too late finds a command that has ended."""
    status = child.wait()
    if number == signal.SIGKILL or status == 0:
        expect(status in (-signal.SIGKILL, 0), f"exit status {status}", child)
        return
    expect(status == 128 + number, f"exit status {status} after {number.name}", child)
    lines = [line for line in child.said().splitlines() if line.startswith(f"{command}: ")]
    expect(len(lines) == 1 and advice in lines[0], "no line that says how it goes on", child)
    expect("Traceback" not in child.said(), "a traceback", child)


def _finish(site: Site, run: Path) -> None:
    child = site.train(run, "--resume")
    expect(child.wait() == 0, "--resume fails", child)
    expect_bits(site, run)


def overwritten(site: Site, draw: random.Random, run: Path) -> int:
    """`--overwrite` with another seed, killed: one of the two runs is there, whole; `--resume` gives the new one."""
    shutil.copytree(site.finished, run)
    before, partial = content(run), run.with_name(f"{run.name}.partial")
    trace = draw.choice(("", "training/fresh", "student", "labels-only", "metrics.json", "report.html", "report.html"))
    child = site.train(run, "--overwrite")
    ready = child.reaches(partial, trace)
    delay = 0.03 if trace == "report.html" else 0.4 * site.spans["."][0]
    hits = int(ready and child.send(signal.SIGKILL, draw.uniform(0, delay)))
    child.wait()
    if hits:
        places = (run, partial / "replaced")
        whole = any(content(place) == before for place in places if place.is_dir())
        complete = any((place / "report.html").is_file() for place in (partial, run))
        expect(whole or complete, "neither the old run nor the new one is whole")
        if run.is_dir() and not (run / "replaced").exists():
            expect(content(run) == before or not partial.exists(), "the finished run was changed")
    _finish(site, run)
    return hits


def adding(site: Site, draw: random.Random, run: Path) -> int:
    """`add-language`: RUN keeps its bits, and `--overwrite` makes the new folder."""
    before = content(site.finished)
    command = ["add-language", str(site.finished), "xh", f"data={site.path / 'xh.jsonl'}", f"output_dir={run}"]
    hits, more = 0, list[str]()
    for _ in range(draw.choice((1, 2))):
        trace = draw.choice(("", "config.yaml", "training/student", "student", "metrics.json"))
        child = Child(run, [*command, *more])
        hits += child.reaches(run, trace) and child.send(signal.SIGKILL, draw.uniform(0, 0.5))
        child.wait()
        more = ["--overwrite"]
    child = Child(run, [*command, "--overwrite"])
    expect(child.wait() == 0, "--overwrite fails", child)
    expect(content(site.finished) == before, "RUN was changed")
    undisturbed = site.path / "added"
    if not undisturbed.exists():
        expect(Child(undisturbed, [*command[:-1], f"output_dir={undisturbed}"]).wait() == 0, "undisturbed fails")
    expect(not differing(bits(undisturbed), bits(run)), "differs from the undisturbed one")
    return hits


def caching(site: Site, draw: random.Random, run: Path) -> int:
    """`cache`: the same command goes on, with the files of one go."""
    shutil.copytree(site.finished, run, ignore=shutil.ignore_patterns("student", "metrics.json"))
    whole = site.path / "cache"
    command = ["cache", str(site.config), f"output_dir={run}", "teacher_cache.shard_rows=2"]
    if not whole.exists():
        child = Child(run, [*command, f"teacher_cache.path={whole}"])
        expect(child.wait() == 0, "cache fails", child)
    here, hits = run.with_name(f"{run.name}.cache"), 0
    for _ in range(draw.choice((1, 2, 3))):
        child = Child(run, [*command, f"teacher_cache.path={here}"])
        trace = f"{draw.choice(('fresh', 't'))}/train-*/shard-{draw.randrange(32):05}*"
        hits += child.reaches(here, trace) and child.send(signal.SIGKILL, draw.uniform(0, 0.02))
        child.wait()
    child = Child(run, [*command, f"teacher_cache.path={here}"])
    expect(child.wait() == 0, "the same command fails", child)
    differ = differing(content(whole), content(here))
    expect(not differ, f"differ from the logits of one go: {', '.join(differ)}")
    return hits


def filled(site: Site, draw: random.Random, run: Path) -> int:
    """The disk gets full in a random stage: one error, checkpoints stay, and `--resume` gives the same bits."""
    with small_disk(run.with_name(f"{run.name}.disk")) as disk:
        _, start, end = draw.choice([stage for stage in STAGES if "*" not in stage[1]])
        there = disk / "run"
        child = site.train(there, log=run)
        child.reaches(there, start)
        time.sleep(draw.uniform(0, site.span(start, end)))
        ballast = fill(disk, draw.choice((0, 0, 4096, 30_000, 100_000)))
        good = {path.parent: content(path.parent) for path in there.glob("training/*/*/trainer_state.json")}
        status = child.wait()
        if status != 0:
            _check_full(child, "amtss-fast train")
            for place, files in list(good.items())[:-1]:
                expect(content(place) == files, f"{place.name} is not what it was")
        ballast.unlink()
        child = site.train(there, "--resume", log=run)
        expect(child.wait() == 0, "--resume fails", child)
        expect_bits(site, there)
        return int(status != 0)


def _check_full(child: Child, command: str) -> None:
    expect(child.status == 2, f"exit status {child.status} on a full disk", child)
    lines = [line for line in child.said().splitlines() if line.startswith(f"{command}: ")]
    expect(len(lines) == 1, "not one line", child)
    known = r"(No space left on device|output_dir: models and checkpoints take about)"
    expect(re.search(f"{command}: {known}.*/", lines[0]) is not None, "the line names no full disk and file", child)
    expect("Traceback" not in child.said(), "a traceback", child)


def filled_cache(site: Site, draw: random.Random, run: Path) -> int:
    """The disk of the cache, or of the new language's folder, gets full: one error; the command works afterwards."""
    with small_disk(run.with_name(f"{run.name}.disk")) as disk:
        base = [str(site.config), f"output_dir={site.finished}", f"teacher_cache.path={disk / 'cache'}"]
        command, trace = ["cache", *base, "teacher_cache.shard_rows=2"], "cache/*/train-*/shard-*"
        if draw.random() < 0.5:
            command = ["add-language", str(site.finished), "xh", f"data={site.path / 'xh.jsonl'}"]
            command, trace = [*command, f"output_dir={disk / 'new'}"], "new/training/student"
        child = Child(run, command)
        child.reaches(disk, trace)
        ballast = fill(disk, draw.choice((0, 4096)))
        status = child.wait()
        if status != 0:
            _check_full(child, f"amtss-fast {command[0]}")
        ballast.unlink()
        child = Child(run, [*command, *(["--overwrite"] if command[0] == "add-language" else [])])
        expect(child.wait() == 0, "the command fails afterwards", child)
        expect(not list(disk.rglob("*.partial")), "left behind", child)
        return int(status != 0)


LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LAUNCHER += ["-m", "amtss_fast.cli"]


def one_of_two(site: Site, draw: random.Random, run: Path) -> int:
    """One of two processes is killed: an error within 30 s. One process is refused, two give the same bits."""
    undisturbed = site.path / "two"
    if not undisturbed.exists():
        child = site.train(undisturbed, launcher=LAUNCHER)
        expect(child.wait() == 0, "two processes fail", child)
    child = site.train(run, launcher=LAUNCHER)
    reached = child.reaches(run, f"training/student/checkpoint-{draw.randrange(2, 8, 2)}/trainer_state.json")
    expect(reached, "two processes fail", child)
    time.sleep(draw.uniform(0, 0.2))
    listed = subprocess.run(["pgrep", "-P", str(child.pid), "-f", "amtss_fast"], capture_output=True, text=True)
    workers = [int(pid) for pid in listed.stdout.split()]
    expect(len(workers) == 2, f"{len(workers)} workers", child)
    os.kill(draw.choice(workers), signal.SIGKILL)
    started = time.monotonic()
    status = child.wait(SECONDS)
    expect(status != 0, "no error", child)
    seconds = time.monotonic() - started
    expect(seconds < 30, f"an error after {seconds:.0f} s", child)
    _expect_refusal(site.train(run, "--resume"), "2 processes")
    child = site.train(run, "--resume", launcher=LAUNCHER)
    expect(child.wait() == 0, "--resume in two processes fails", child)
    expect_bits(site, run, bits(undisturbed))
    return 1


def more_processes(site: Site, draw: random.Random, run: Path) -> int:
    """A run of one process does not go on in two; in one it does."""
    child = site.train(run)
    child.reaches(run, f"training/student/checkpoint-{draw.randrange(2, 8, 2)}/trainer_state.json")
    hits = int(child.send(signal.SIGKILL, draw.uniform(0, 0.02)))
    child.wait()
    if hits:
        _expect_refusal(site.train(run, "--resume", launcher=LAUNCHER), "1 process")
    _finish(site, run)
    return hits


def _expect_refusal(child: Child, words: str) -> None:
    expect(child.wait() != 0, "another number of processes is accepted", child)
    lines = [line for line in child.said().splitlines() if line.startswith("amtss-fast train: cannot resume ")]
    expect(bool(lines) and words in lines[0], "no line that names the number of processes", child)


SAME = "same bits after `--resume`"


def table() -> dict[str, Row]:
    rows = {f"kill-{i}": Row(stage[0], "SIGKILL", SAME, killed(stage)) for i, stage in enumerate(STAGES)}
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        how = f"exit status {status}, one line that says how it goes on, {SAME}"
        rows[number.name.lower()] = Row("the student's training", number.name, how, killed(STAGES[2], number))
    rows["overwrite"] = Row("`--overwrite`, any moment", "SIGKILL", f"old or new run whole, {SAME}", overwritten)
    rows["add-language"] = Row("`add-language`", "SIGKILL", "RUN untouched, same bits after `--overwrite`", adding)
    rows["cache"] = Row("`cache`", "SIGKILL", "same files after the same command", caching)
    one_line = "one line that names the file"
    rows["disk"] = Row("`train`, any stage", "full disk", f"{one_line}, checkpoints stay, {SAME}", filled)
    rows["disk-others"] = Row("`cache`, `add-language`", "full disk", f"{one_line}, then it works", filled_cache)
    refused = "another number of processes is refused"
    rows["two"] = Row(
        "one of two processes", "SIGKILL", f"an error within 30 s, {refused}, {SAME}", one_of_two, slow=True
    )
    rows["more"] = Row("one process, then two", "SIGKILL", f"{refused}, {SAME}", more_processes, slow=True)
    return rows


def attempt(row: Row, site: Site, seed: str, run: Path) -> None:
    row.runs += 1
    try:
        row.hits += row.once(site, random.Random(seed), run)
    except (Wrong, TimeoutError, OSError, ValueError) as error:
        row.wrong.append(f"{row.what}, seed {seed}: {error}")
        return
    for path in run.parent.glob(f"{run.name}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def main() -> int:
    rows = table()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="runs of each row; a tenth of it where launchers start")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", default=",".join(rows), help="names, separated by commas (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where the runs are made, and those that went wrong are kept")
    options = parser.parse_args()
    chosen = {name: rows[name] for name in options.rows.split(",")}
    if any(name.startswith("disk") for name in chosen) and not has_small_disks():
        print("left out, no right to mount a tmpfs: the rows of full disks\n")
        chosen = {name: row for name, row in chosen.items() if not name.startswith("disk")}
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        site = Site((options.folder or Path(temporary)).absolute() / f"{options.seed}")
        settings = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        os.environ |= settings | {"HF_HOME": str(site.path / "huggingface")}
        # Everything that a child would import.
        import amtss_fast.runs
        import amtss_fast.runs.new_language
        import amtss_fast.runs.report  # noqa: F401

        # A child need not look through what its parent has imported.
        gc.freeze()

        site.prepare()
        site.observe()
        for name, row in chosen.items():
            for i in range(max(1, options.runs // 10) if row.slow else options.runs):
                attempt(row, site, f"{options.seed}-{name}-{i}", site.path / f"{name}-{i}")
            print(f"{name}: {row.runs} runs, {row.hits} hits, {len(row.wrong)} wrong", file=sys.stderr, flush=True)
    print("| disturbed | by | runs | hits | what must hold | wrong |\n| --- | --- | --- | --- | --- | --- |")
    for row in chosen.values():
        print(f"| {row.what} | {row.how} | {row.runs} | {row.hits} | {row.must} | {len(row.wrong) or 'none'} |")
    for text in (text for row in chosen.values() for text in row.wrong):
        print(f"\nWRONG: {text}")
    return int(any(row.wrong for row in chosen.values()))


if __name__ == "__main__":
    sys.exit(main())
