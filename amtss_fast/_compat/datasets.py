"""Private interfaces of datasets: each stands here once, with the error that names what is gone."""

from __future__ import annotations

import datasets
from datasets import Dataset


def fingerprint(dataset: Dataset) -> str:
    """The hash that datasets keeps of a data set's content and of all that was done to it.

    Raises:
        RuntimeError: this version keeps none.
    """
    value = getattr(dataset, "_fingerprint", None)
    if not isinstance(value, str):
        raise RuntimeError(f"datasets {datasets.__version__} has no Dataset._fingerprint, which amtss_fast needs")
    return value
