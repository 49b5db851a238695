"""Runs: from a configuration to a folder with a trained student and its report.

`config` is the configuration, `folder` the folder, `setup` what all trainings of a run share, `build` its models,
teachers and trainers. `preflight` checks all of it before it starts, and `preview` says what it will do.
`distil` and `new_language` are the recipes; `caching`, `checking` and `fitting` compute cached logits, compare
precisions of teachers and fit a training into memory.
"""
# The guard stands before the imports that it guards.
# ruff: noqa: E402

from amtss_fast._compat.extras import need_training_extra

need_training_extra(__name__)

from amtss_fast.runs.build import load_teachers, make_trainer, new_student, train_teachers
from amtss_fast.runs.caching import cached_teachers, compute_cache
from amtss_fast.runs.checking import check_teachers
from amtss_fast.runs.config import RunConfig, load_config
from amtss_fast.runs.distil import distil
from amtss_fast.runs.new_language import add_language
from amtss_fast.runs.preview import preview
from amtss_fast.runs.setup import Setup, load_run_data, prepare

__all__ = [
    "RunConfig",
    "Setup",
    "add_language",
    "cached_teachers",
    "check_teachers",
    "compute_cache",
    "distil",
    "load_config",
    "load_run_data",
    "load_teachers",
    "make_trainer",
    "new_student",
    "prepare",
    "preview",
    "train_teachers",
]
