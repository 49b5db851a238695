"""Models, teachers and trainers of a run."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import DatasetDict
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, TrainerState, set_seed

from amtss_fast._system.files import names_file, write_atomically
from amtss_fast.errors import NotFiniteError, UserError, user_errors
from amtss_fast.models import AMTSSConfig, adopt_pad_token, read_encoder, read_model_config, told_of
from amtss_fast.runs.config import ModelConfig, RunConfig, TeacherConfig
from amtss_fast.runs.setup import Setup, teacher_arguments
from amtss_fast.teachers import LiveTeachers, Teacher, Teachers, load_teacher
from amtss_fast.training import AMTSSTrainer, AMTSSTrainingArguments

_STATE = "trainer_state.json"
"""The file of a checkpoint that is written last."""


def new_student(setup: Setup) -> Any:
    """The student before its training: the same weights at every call."""
    return new_model(setup, setup.config.student, setup.languages)


def new_model(setup: Setup, model: ModelConfig, languages: Sequence[str]) -> Any:
    """A model before its training, of the run's task and labels.

    Raises:
        UserError: a configuration or checkpoint that gives no such model.
    """
    options = model.model_dump(exclude={"encoder"})
    whose = _whose(setup.config, model)
    described = read_encoder(model.encoder, setup.tokenizer, whose=whose)
    set_seed(setup.config.seed)
    encoder: Any = model.encoder if isinstance(model.encoder, str) else described
    with told_of(whose):
        built = setup.task.new_model(encoder, languages=languages, label_names=setup.label_names, **options)
    adopt_pad_token(built.config, setup.tokenizer)
    return built


def _whose(config: RunConfig, model: ModelConfig) -> str:
    """Whose encoder a model of the configuration has, for messages."""
    names = [teacher.name for teacher in config.teachers if teacher.model is model]
    return f"teacher {names[0]!r}: model.encoder" if names else "student.encoder"


def find_teacher(setup: Setup, teacher: TeacherConfig) -> str | Path:
    """Where a teacher is: its checkpoint, or the folder that this run trains it into."""
    return teacher.path or setup.folder.teacher(teacher.name)


def load_teachers(setup: Setup, teachers: Sequence[TeacherConfig] | None = None) -> LiveTeachers:
    """The run's teachers, or others of its task, loaded. Those that the run trains must be there.

    Raises:
        UserError: a checkpoint that is no such teacher.
    """
    teachers = setup.config.teachers if teachers is None else teachers
    turns = teachers_in_turns(setup, len(teachers))
    with user_errors():
        return setup.task.teachers(
            # Those that take turns wait on the CPU.
            [_load_teacher(setup, teacher, "cpu" if turns else setup.device) for teacher in teachers],
            label_names=setup.label_names,
            languages=setup.languages,
            tokenizer=setup.tokenizer,
            **turns,
        )


def _load_teacher(setup: Setup, teacher: TeacherConfig, device: Any) -> Teacher:
    options = teacher.model_dump(exclude={"path", "model", "training"})
    return load_teacher(find_teacher(setup, teacher), device=device, task=setup.task.name, **options)


def taught_languages(setup: Setup, teacher: TeacherConfig) -> list[str]:
    """The run's languages that a teacher teaches, from its configuration and without loading it."""
    codes: Sequence[str] | None = teacher.languages
    if codes is None:
        with user_errors():
            config = read_model_config(find_teacher(setup, teacher), whose=f"teacher {teacher.name!r}")
        codes = config.languages if isinstance(config, AMTSSConfig) else setup.languages
    return [code for code in setup.languages if code in codes]


def teachers_in_turns(setup: Setup, n_teachers: int) -> dict[str, Any]:
    """Arguments of a pool whose teachers take turns on the device; empty where all of them may stay there.

    Raises:
        UserError: `teachers_resident` without such a device.
    """
    resident = setup.config.teachers_resident
    if resident is None or resident >= n_teachers:
        return {}
    if setup.device.type != "cuda":
        raise UserError(
            f"teachers_resident = {resident} is for GPUs, this run is on {setup.device}: on a CPU there is nowhere "
            "to move teachers to"
        )
    return {"resident": resident, "device": setup.device}


def train_teachers(setup: Setup) -> None:
    """Trains the teachers that have no path and are not in the run's folder yet, each on the labels of its languages.

    The folder must be open.
    """
    for teacher in setup.config.teachers:
        target = setup.folder.teacher(teacher.name)
        if teacher.model is None or target.is_dir():
            continue
        languages = teacher.languages or setup.languages
        wanted = set(languages)
        data = DatasetDict(
            {
                split: rows.filter(lambda language, wanted=wanted: language in wanted, input_columns="language")
                for split, rows in setup.data.items()
            }
        )
        model = new_model(setup, teacher.model, languages)
        trainer = make_trainer(setup, model, data, None, teacher_arguments(setup.config, teacher), languages)
        train(setup, trainer)
        setup.folder.keep_model(trainer, target)


def make_trainer(
    setup: Setup,
    model: PreTrainedModel,
    data: DatasetDict,
    teachers: Teachers | None,
    arguments: AMTSSTrainingArguments,
    languages: Sequence[str],
) -> AMTSSTrainer:
    """The trainer of a model on the splits of `data`, as texts."""
    keep_text = teachers is not None and teachers.needs_text
    encoded = setup.encode(data, languages=languages, keep_text=keep_text)
    if teachers is not None:
        encoded = teachers.number_rows(encoded)
    # RuntimeError: a tracker of `report_to` that is not installed.
    with user_errors(RuntimeError):
        return AMTSSTrainer(
            model,
            arguments,
            teachers=teachers,
            languages=languages,
            train_dataset=encoded["train"],
            eval_dataset=encoded.get("validation"),
            data_collator=setup.collator(keep_text),
            processing_class=setup.tokenizer,
        )


def make_trial(
    setup: Setup,
    model: PreTrainedModel,
    data: DatasetDict,
    teachers: Teachers | None,
    arguments: AMTSSTrainingArguments,
    languages: Sequence[str],
) -> AMTSSTrainer:
    """A trainer as :func:`make_trainer` makes it, that is not to be run: it leaves nothing on the disk."""
    arguments = copy.copy(arguments)
    with tempfile.TemporaryDirectory() as folder:
        # The stock trainer makes its output folder.
        arguments.output_dir = folder
        return make_trainer(setup, model, data, teachers, arguments, languages)


def train(setup: Setup, trainer: AMTSSTrainer) -> None:
    """Trains, from the last checkpoint where the run goes on; all processes call it.

    Raises:
        UserError: a checkpoint of another number of processes.
    """
    folder = Path(str(trainer.args.output_dir))
    if trainer.is_world_process_zero():
        rows: Any = trainer.train_dataset
        model: Any = trainer.model
        texts = f"{len(rows):,} texts in {len(trainer.languages)} languages"
        size = f"{model.num_parameters() / 1e6:.1f} M parameters"
        print(f"\nTraining {folder.name}: {texts}, {size}", flush=True)
    checkpoint = last_checkpoint(folder, trainer.args.world_size) if setup.resume else None
    if trainer.is_world_process_zero():
        for torn in (path for path in _checkpoints(folder) if not _is_whole(path)):
            shutil.rmtree(torn)
        if checkpoint is not None:
            _find_best_again(checkpoint)
    trainer.accelerator.wait_for_everyone()
    if checkpoint is not None and _finish(setup, trainer, checkpoint):
        return
    try:
        with names_file(folder):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except NotFiniteError as error:
        raise NotFiniteError(f"{folder.name}: {error}") from error


def _finish(setup: Setup, trainer: AMTSSTrainer, checkpoint: Path) -> bool:
    """Whether the checkpoint is of the last step; its weights are then those of the trained model.

    The stock loop looks at the number of steps after each step: it would train one step more than it was asked for.
    """
    state = TrainerState.load_from_json(str(checkpoint / _STATE))
    if state.global_step < state.max_steps:
        return False
    trainer.state, place = state, checkpoint
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None:
        place = Path(state.best_model_checkpoint)
    model: Any = trainer.model
    model.load_state_dict(setup.task.load_model(place).state_dict())
    return True


def _find_best_again(checkpoint: Path) -> None:
    """Corrects where the best checkpoint is, in a folder that has moved: the stock loop would go on without it."""
    file = checkpoint / _STATE
    state = json.loads(file.read_bytes())
    if state.get("best_model_checkpoint") is None:
        return
    best = checkpoint.with_name(Path(state["best_model_checkpoint"]).name)
    if state["best_model_checkpoint"] != str(best) and best.is_dir():
        write_atomically(file, json.dumps(state | {"best_model_checkpoint": str(best)}, indent=2))


def last_checkpoint(folder: Path, processes: int) -> Path | None:
    """The last checkpoint that a training can go on from, if there is one.

    Raises:
        UserError: it was written by another number of processes, whose batches were others.
    """
    for path in _checkpoints(folder):
        # One file of each process. There is none where `save_only_model` leaves out what a training needs to go on.
        writers = len(list(path.glob("rng_state*.pth")))
        if not writers or not _is_whole(path):
            continue
        if writers != processes:
            raise UserError(
                f"cannot resume {path}: it was trained in {_count(writers)}, and here there would be "
                f"{_count(processes)}, with other batches: start it in {_count(writers)}, or anew with --overwrite"
            )
        return path
    return None


def _checkpoints(folder: Path) -> list[Path]:
    """All checkpoints, the last one first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=lambda path: -int(path.name.removeprefix("checkpoint-")))


def _is_whole(checkpoint: Path) -> bool:
    """Whether nothing interrupted its writing.

    The state is the last file, and half of an object is no JSON. Where the machine itself went down, any other file may
    be cut short: of an archive the end is missing, of weights some that their header names.
    """
    try:
        json.loads((checkpoint / _STATE).read_bytes())
        for weights in checkpoint.glob("*.safetensors"):
            with safe_open(weights, "pt"):
                pass
    except (FileNotFoundError, ValueError, SafetensorError):
        return False
    return all(zipfile.is_zipfile(file) for suffix in ("pt", "pth") for file in checkpoint.glob(f"*.{suffix}"))


def _count(processes: int) -> str:
    return "1 process" if processes == 1 else f"{processes} processes"
