"""The files of a run folder."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest

from amtss_fast._system.files import names_file, write_atomically
from amtss_fast.errors import UserError
from amtss_fast.runs.build import _last_checkpoint
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
    # What has nothing to do with the disk is left as it is.
    for other in (OSError("no such model"), BrokenPipeError(errno.EPIPE, "Broken pipe"), ValueError("a bug")):
        with pytest.raises(type(other)) as found, names_file(tmp_path):
            raise other
        assert found.value is other


def test_an_unfinished_checkpoint_is_none(tmp_path: Path) -> None:
    assert _last_checkpoint(tmp_path / "nothing") is None
    for step in (50, 100, 1000):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-100" / "trainer_state.json").write_text("{}")
    assert _last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")
    assert not (tmp_path / "checkpoint-1000").exists()
    assert (tmp_path / "checkpoint-best").exists()
