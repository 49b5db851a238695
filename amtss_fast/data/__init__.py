"""Multilingual data: reading it, splitting it, and turning it into batches."""
# The guard stands before the imports that it guards.
# ruff: noqa: E402

from amtss_fast._compat.extras import need_training_extra

need_training_extra(__name__)

from amtss_fast.data.collate import DistillationCollator, LanguageModelCollator
from amtss_fast.data.encoding import encode
from amtss_fast.data.labels import align_labels
from amtss_fast.data.languages import label_counts, language_counts
from amtss_fast.data.load import load_data
from amtss_fast.data.sampling import LANGUAGE_SAMPLINGS, LanguageSampler, LanguageSampling, check_sampling
from amtss_fast.data.splits import keep_labels, split_data
from amtss_fast.data.targets import LANGUAGE_MODELS, TASKS, TOKEN_TASKS, Targets, token_targets
from amtss_fast.data.tokenizers import train_tokenizer

__all__ = [
    "LANGUAGE_MODELS",
    "LANGUAGE_SAMPLINGS",
    "TASKS",
    "TOKEN_TASKS",
    "DistillationCollator",
    "LanguageModelCollator",
    "LanguageSampler",
    "LanguageSampling",
    "Targets",
    "align_labels",
    "check_sampling",
    "encode",
    "keep_labels",
    "label_counts",
    "language_counts",
    "load_data",
    "split_data",
    "token_targets",
    "train_tokenizer",
]
