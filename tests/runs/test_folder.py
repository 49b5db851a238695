"""The files of a run folder."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from amtss_fast._system.files import names_file, write_atomically
from amtss_fast.errors import UserError
from amtss_fast.runs.build import last_checkpoint
from amtss_fast.runs.config import load_config
from amtss_fast.runs.folder import RunFolder, check_folder, nest


def test_nest() -> None:
    assert nest({"step": 1, "w/a/en": 0.5, "w/b/en": 0.25}) == {"step": 1, "w": {"a": {"en": 0.5}, "b": {"en": 0.25}}}


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (["data.max_length=16"], ["data.max_length: 32 there, 16 here"]),
        (["teachers.1.prior=2"], ["teachers.1.prior: 1.0 there, 2.0 here"]),
        (["teachers.2.languages=[en, ur]"], ["languages.1: 'ar' there, 'ur' here", "languages.2: 'ur' there, not set"]),
        (["training.bf16=false"], ["training.bf16: not set there, False here"]),
        (["data.name=1", "seed=3"], ["seed: 0 there, 3 here", "data.name: 'cldr_topic' there, '1' here"]),
        (["memory.budget=6GB"], ["memory: None there, {'budget': '6GB', 'approximate': True} here"]),
        (["labels_only=false"], ["labels_only: True there, False here"]),
        (["student.encoder.hidden_size=64"], ["student.encoder.hidden_size: 128 there, 64 here"]),
        (["training.per_device_train_batch_size=8"], ["training.per_device_train_batch_size: 64 there, 8 here"]),
    ],
)
def test_a_run_goes_on_with_the_settings_that_it_began_with(
    overrides: list[str], lines: list[str], tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.open(load_config("demo"))
    with pytest.raises(UserError) as error:
        folder.check(load_config("demo", overrides), resume=True)
    assert all(line in str(error.value) for line in lines)
    with pytest.raises(UserError, match="cannot resume"):
        folder.open(load_config("demo", overrides), resume=True)


@pytest.mark.parametrize(
    "override",
    [
        "title=Other",
        "output_dir=elsewhere",
        "teacher_cache.path=cache",
        "teachers_resident=1",
        "training.logging_steps=7",
        "teacher_training.report_to=tensorboard",
        "teachers.0.training.disable_tqdm=true",
        "training.dataloader_num_workers=1",
    ],
)
def test_settings_that_change_nothing_that_is_trained(override: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.open(load_config("demo"))
    folder.open(load_config("demo", [override]), resume=True)
    assert load_config(folder.config) == load_config("demo", [override])


def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in (tmp_path / ("n" * 300), tmp_path / ("n" * 300) / "run"):
        with pytest.raises(UserError, match=r"output_dir .*nnn.* cannot be a folder: File name too long"):
            check_folder(wrong, "output_dir")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"output_dir .*link is a file"):
        check_folder(tmp_path / "link", "output_dir")
    check_folder(tmp_path / "a" / "b", "output_dir")
    # A superuser may write everywhere.
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(UserError, match=f"output_dir .*run cannot be written: no right to write in {tmp_path}"):
        check_folder(tmp_path / "run", "output_dir")


def test_a_full_disk_is_told_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "file").write_text("old")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", fail)
        with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'file'}'") as error:
            write_atomically(tmp_path / "file", "new")
    assert error.value.filename == str(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "old"
    torch_says = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
    with pytest.raises(RuntimeError, match="unexpected pos"), names_file(tmp_path):
        raise torch_says
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
    for error_ in (torch_says, RuntimeError("I/O error: No space left on device (os error 28)")):
        with pytest.raises(OSError, match="No space left on device") as error, names_file(tmp_path / "run"):
            raise error_
        assert error.value.filename == str(tmp_path / "run")
    with pytest.raises(OSError, match="No space left on device") as error, names_file(tmp_path / "shard"):
        raise OSError(errno.ENOSPC, "Error writing bytes to file. Detail: [errno 28] No space left on device")
    assert error.value.strerror == "No space left on device"
    # What has nothing to do with the disk is left as it is.
    for other in (OSError("no such model"), BrokenPipeError(errno.EPIPE, "Broken pipe"), ValueError("a bug")):
        with pytest.raises(type(other)) as found, names_file(tmp_path):
            raise other
        assert found.value is other


def checkpoint(folder: Path, step: int, processes: int = 1, state: str | None = "{}") -> None:
    place = folder / f"checkpoint-{step}"
    place.mkdir(parents=True)
    for name in ["rng_state.pth"] if processes == 1 else [f"rng_state_{i}.pth" for i in range(processes)]:
        torch.save({}, place / name)
    if state is not None:
        (place / "trainer_state.json").write_text(state)


def test_the_last_checkpoint_that_is_whole(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "nothing", 1) is None
    for step, state in ((50, "{}"), (100, "{}"), (150, '{"log_history": ['), (200, ""), (1000, None)):
        checkpoint(tmp_path, step, state=state)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path, 1) == tmp_path / "checkpoint-100"
    # What `save_only_model` leaves has no state of the optimizer.
    checkpoint(tmp_path, 2000, processes=0)
    assert last_checkpoint(tmp_path, 1) == tmp_path / "checkpoint-100"


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
@pytest.mark.parametrize("kept", [0, 1, 9, -1])
def test_a_checkpoint_with_a_file_that_is_cut_short_is_none(name: str, kept: int, tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint(tmp_path, step)
        place = tmp_path / f"checkpoint-{step}"
        save_file({"weight": torch.ones(3)}, place / "model.safetensors")
        for file in ("optimizer.pt", "scheduler.pt"):
            torch.save({"step": torch.ones(3)}, place / file)
    assert last_checkpoint(tmp_path, 1) == place
    (place / name).write_bytes((place / name).read_bytes()[:kept])
    assert last_checkpoint(tmp_path, 1) == tmp_path / "checkpoint-1"


@pytest.mark.parametrize(("then", "now"), [(1, 2), (2, 1), (2, 3)])
def test_another_number_of_processes_is_refused(then: int, now: int, tmp_path: Path) -> None:
    checkpoint(tmp_path, 10, processes=then)
    assert last_checkpoint(tmp_path, then) == tmp_path / "checkpoint-10"
    with pytest.raises(UserError, match=f"cannot resume .*checkpoint-10: it was trained in {then} process.*be {now} p"):
        last_checkpoint(tmp_path, now)
    # Half of a checkpoint refuses nothing.
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text("{")
    assert last_checkpoint(tmp_path, now) is None


class TestReplacing:
    """A run is replaced by a new one that is complete, whenever it is stopped."""

    def folders(self, tmp_path: Path) -> tuple[RunFolder, RunFolder]:
        target = RunFolder(tmp_path / "run")
        new = target.replacement
        for folder, word in ((target, "old"), (new, "new")):
            folder.open(load_config("demo"))
            folder.student.mkdir()
            (folder.student / "weights").write_text(word)
        return target, new

    def test_nothing_beside_it_is_touched(self, tmp_path: Path) -> None:
        target, new = self.folders(tmp_path)
        for name in ("run.old", "run.bak"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "mine").write_text("mine")
        new.take_place_of(target)
        assert (target.student / "weights").read_text() == "new"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.bak", "run.old"]
        assert (tmp_path / "run.old" / "mine").read_text() == "mine"
        assert not (target.path / "replaced").exists()

    @pytest.mark.parametrize("step", [0, 1])
    def test_stopped_in_the_middle(self, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        target, new = self.folders(tmp_path)
        move, moves = os.replace, []

        def stop(*names: Any) -> None:
            if len(moves) == step:
                raise KeyboardInterrupt
            moves.append(names)
            move(*names)

        with monkeypatch.context() as stopped:
            stopped.setattr(os, "replace", stop)
            with pytest.raises(KeyboardInterrupt):
                new.take_place_of(target)
        old = target.path if step == 0 else new.path / "replaced"
        assert (old / "student" / "weights").read_text() == "old"
        assert (new.student / "weights").read_text() == "new"
        if step == 1:
            for overwrite in (False, True):
                with pytest.raises(FileExistsError, match=r"run was being replaced .*: --resume puts it there"):
                    target.check(overwrite=overwrite)
        target.check(resume=True)
        assert target.working(overwrite=False, resume=True) == new
        new.check(load_config("demo"), resume=True)
        new.take_place_of(target)
        assert (target.student / "weights").read_text() == "new"
        assert [path.name for path in tmp_path.iterdir()] == ["run"]

    def test_through_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "disk").mkdir()
        (tmp_path / "run").symlink_to(tmp_path / "disk" / "run")
        (tmp_path / "disk" / "run").mkdir()
        target, new = self.folders(tmp_path)
        assert new.path == tmp_path / "disk" / "run.partial"
        new.take_place_of(target)
        assert (tmp_path / "run").is_symlink()
        assert (tmp_path / "disk" / "run" / "student" / "weights").read_text() == "new"
        assert [path.name for path in (tmp_path / "disk").iterdir()] == ["run"]

    def test_removing_is_interrupted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        target, _ = self.folders(tmp_path)
        remove = shutil.rmtree

        def stop(*places: Any) -> None:
            remove(*places)
            raise KeyboardInterrupt

        with monkeypatch.context() as stopped:
            stopped.setattr(shutil, "rmtree", stop)
            with pytest.raises(KeyboardInterrupt):
                target.open(load_config("demo"), overwrite=True)
        target.open(load_config("demo", ["seed=1"]), overwrite=True)
        assert [path.name for path in target.path.iterdir()] == ["config.yaml"]

    def test_stopped_before_it_had_a_configuration(self, tmp_path: Path) -> None:
        folder = RunFolder(tmp_path / "run")
        folder.path.mkdir()
        (folder.path / "config.yaml.partial").write_text("output")
        assert folder.is_empty
        folder.open(load_config("demo"))
        assert [path.name for path in folder.path.iterdir()] == ["config.yaml"]

    def test_a_mounted_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        target, _ = self.folders(tmp_path)
        monkeypatch.setattr(os.path, "ismount", lambda path: path == target.path)
        target.check(resume=True)
        with pytest.raises(UserError, match=r"output_dir .* is where a disk is mounted"):
            target.check(overwrite=True)
