"""The folder of a run: where everything lies in it, and how it is written.

RUN/config.yaml      the configuration, in full
RUN/teachers/NAME/   teachers that were trained here      RUN/labels-only/   the same student without teachers
RUN/student/         the student and its tokenizer
RUN/training/NAME/   checkpoints and TensorBoard logs of each training
RUN/log.jsonl        the student's training log
RUN/memory.json      the plan that `memory.budget` led to, and the measured peak
RUN/metrics.json     scores on the test split             RUN/report.html    all of it, with pictures

Whatever is written here is whole or absent: models and files get their name when they are complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from transformers import Trainer

from amtss_fast._system.files import names_file, write_atomically
from amtss_fast.errors import UserError
from amtss_fast.runs.changes import changes
from amtss_fast.runs.config import RunConfig, load_config, problem
from amtss_fast.runs.memory_plan import MemoryPlan

_FILES = ("config.yaml", "log.jsonl", "memory.json", "metrics.json", "report.html")
_FOLDERS = ("teachers", "student", "labels-only", "training")
# In the folder of a new run: the run whose place it takes, until it has it.
_REPLACED = "replaced"


@dataclass(frozen=True)
class RunFolder:
    """The places of a run folder and what is kept in them."""

    path: Path

    @property
    def config(self) -> Path:
        """The configuration."""
        return self.path / "config.yaml"

    @property
    def student(self) -> Path:
        """The student, once it is trained."""
        return self.path / "student"

    @property
    def labels_only(self) -> Path:
        """The student that was trained on labels alone."""
        return self.path / "labels-only"

    def teacher(self, name: str) -> Path:
        """A teacher that was trained here."""
        return self.path / "teachers" / name

    def training(self, name: str) -> Path:
        """Checkpoints and logs of a training."""
        return self.path / "training" / name

    @property
    def is_finished(self) -> bool:
        """Whether a student was trained here."""
        return self.config.is_file() and self.student.is_dir()

    @property
    def is_empty(self) -> bool:
        """Whether nothing is there. A run that was stopped before it had a configuration has left nothing."""
        partial = f"{self.config.name}.partial"
        return not self.path.is_dir() or all(path.name == partial for path in self.path.iterdir())

    @property
    def replacement(self) -> RunFolder:
        """Beside it, where the run is made that will take the place of the one here."""
        place = self.path.resolve()
        return RunFolder(place.with_name(f"{place.name}.partial"))

    def working(self, *, overwrite: bool, resume: bool) -> RunFolder:
        """Where a run is made: here, or in `replacement` while a run that is here waits to be replaced."""
        waits = (overwrite and not self.is_empty) or (resume and self.replacement.config.is_file())
        return self.replacement if waits else self

    def take_place_of(self, target: RunFolder) -> None:
        """Moves this finished run to the target, whose own run is removed last."""
        if self != target:
            place, old = target.path.resolve(), self.path / _REPLACED
            if place.exists():
                shutil.rmtree(old, ignore_errors=True)
                # From here to the next line `resume` alone goes on, see `check`.
                os.replace(place, old)
            os.replace(self.path, place)
        shutil.rmtree(target.path / _REPLACED, ignore_errors=True)

    def check(self, config: RunConfig | None = None, *, overwrite: bool = False, resume: bool = False) -> None:
        """Whether a run can be written here.

        Args:
            config: what `resume` would continue with; None: nothing to compare.
            overwrite, resume: what may happen to a run that is here.

        Raises:
            FileExistsError: it holds other files, or a run and neither `overwrite` nor `resume` is set.
            UserError: it cannot be written or replaced; `resume` with another configuration, whose keys are named.
        """
        check_folder(self.path, "output_dir")
        if not self.path.exists() and not resume and (self.replacement.path / _REPLACED).is_dir():
            raise FileExistsError(
                f"{self.path} was being replaced by {self.replacement.path}, which is complete: --resume puts it there"
            )
        if self.is_empty:
            return
        # Nothing that a run has not written is ever removed.
        known = (*_FILES, *_FOLDERS, _REPLACED)
        foreign = sorted(p.name for p in self.path.iterdir() if p.name.removesuffix(".partial") not in known)
        if foreign or not self.config.is_file():
            found = f"it has {', '.join(foreign[:5])}" if foreign else "it has no config.yaml"
            raise FileExistsError(f"{self.path} is not empty and holds no run ({found}): choose another output_dir")
        if not overwrite and not resume:
            raise FileExistsError(
                f"{self.path} is not empty and holds a run: choose another output_dir, --resume or --overwrite"
            )
        if overwrite and os.path.ismount(self.path):
            raise UserError(
                f"output_dir {self.path} is where a disk is mounted, and a folder that takes its place cannot lie "
                "beside it: choose a folder in it"
            )
        if resume and config is not None and (changed := changes(load_config(self.config), config)):
            separator = "\n  " if len(changed) > 1 else " "
            raise UserError(separator.join([f"cannot resume {self.path}, settings have changed:", *changed]))

    def open(self, config: RunConfig, *, overwrite: bool = False, resume: bool = False) -> None:
        """Makes the folder a run of this configuration.

        Raises:
            FileExistsError, UserError: as :meth:`check`.
        """
        self.check(config, overwrite=overwrite, resume=resume)
        if not self.is_empty and overwrite:
            # Not the configuration, which tells that this is a run: removing may be interrupted.
            for path in set(self.path.iterdir()) - {self.config}:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.config, config.to_yaml())

    def keep_model(self, trainer: Trainer, target: Path) -> None:
        """Saves a trainer's model, with its tokenizer, as the folder `target`; call it in all processes."""
        partial = target.with_name(target.name + ".partial")
        with names_file(target):
            trainer.save_model(str(partial))
        if trainer.is_world_process_zero():
            os.replace(partial, target)
        trainer.accelerator.wait_for_everyone()

    def write_log(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Writes the log history of the student's training."""
        lines = [json.dumps(nest(entry), ensure_ascii=False) for entry in history]
        write_atomically(self.path / "log.jsonl", "\n".join(lines) + "\n")

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Writes the scores and what belongs to them."""
        write_atomically(self.path / "metrics.json", json.dumps(metrics, indent=1, ensure_ascii=False))

    def read_plan(self) -> MemoryPlan | None:
        """The plan that is kept here; None if there is none.

        Raises:
            UserError: a file that holds no plan.
        """
        file = self.path / "memory.json"
        if not file.is_file():
            return None
        try:
            return TypeAdapter(MemoryPlan).validate_json(file.read_bytes(), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            wrong = ": ".join([*map(str, first["loc"]), problem(**first)])
            raise UserError(f"{file} holds no plan ({wrong}): start the run anew with --overwrite") from error

    def write_plan(self, plan: MemoryPlan) -> None:
        """Keeps a plan."""
        write_atomically(self.path / "memory.json", json.dumps(asdict(plan), indent=1) + "\n")


def check_folder(path: Path, key: str) -> None:
    """Raise UserError where no folder can be made or written: `key` is the setting that gives it."""
    try:
        here = next(place for place in (path.absolute(), *path.absolute().parents) if os.path.lexists(place))
        if not here.is_dir():
            under = "is a file" if here == path.absolute() else f"lies under {here}, which is a file"
            raise UserError(f"{key} {path} {under}: choose another folder")
        # A name that is too long shows here.
        path.is_dir()
    except OSError as error:
        raise UserError(f"{key} {path} cannot be a folder: {error.strerror}") from error
    if not os.access(here, os.W_OK | os.X_OK):
        raise UserError(f"{key} {path} cannot be written: no right to write in {here}")


def nest(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A log entry with its slashed names as mappings: `teacher_weight/NAME/en` becomes `{"teacher_weight": ...}`."""
    nested: dict[str, Any] = {}
    for name, value in entry.items():
        *parents, last = name.split("/")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return nested
