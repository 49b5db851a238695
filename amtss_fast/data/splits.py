"""Splits: dividing a table, and hiding labels of a split."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict

from amtss_fast.data.arrow import dataset_of, has_label, in_lists, table_of, value_codes
from amtss_fast.errors import UserError
from amtss_fast.loss.options import UNLABELED_INDEX

SPLIT_ORDER = ("train", "validation", "test")


def split_data(
    dataset: Dataset,
    *,
    validation: float = 0.1,
    test: float = 0.1,
    seed: int,
    by: str | None = None,
) -> DatasetDict:
    """Splits one table at random into train, validation and test.

    Args:
        dataset: one table.
        validation, test: fractions of the rows, together below 1; 0 leaves the split out.
        seed: of the choice.
        by: a column. Rows with the same value in it stay together (the same sentence in several languages, for
            example), and the fractions are of its distinct values.

    Raises:
        UserError: fractions that leave nothing to train on or make a split empty, or no column `by`.
    """
    if isinstance(dataset, DatasetDict):
        raise TypeError("split_data takes one table, for example data['train']")
    if validation < 0 or test < 0 or validation + test >= 1:
        raise UserError(f"validation and test must be at least 0 and below 1 together, not {validation} and {test}")
    if by is None:
        unit = np.arange(len(dataset))
    elif by in dataset.column_names:
        unit = value_codes(table_of(dataset)[by])
    else:
        raise UserError(f"no column {by!r} (argument by) in the data set; its columns are {dataset.column_names}")
    units = int(unit.max(initial=-1)) + 1
    sizes = {"validation": round(units * validation), "test": round(units * test)}
    sizes["train"] = units - sum(sizes.values())
    place = np.random.default_rng(seed).permutation(units)[unit]
    result, start = DatasetDict(), 0
    fractions = {"train": 1 - validation - test, "validation": validation, "test": test}
    for split in SPLIT_ORDER:
        rows = np.flatnonzero((place >= start) & (place < start + sizes[split]))
        start += sizes[split]
        if fractions[split] == 0:
            continue
        if len(rows) == 0:
            raise UserError(
                f"split {split!r} is empty: {units} {'rows' if by is None else f'values of {by!r}'}"
                f" are too few for validation={validation}, test={test}"
            )
        result[split] = dataset_of(table_of(dataset).take(rows), dataset.features, split)
    return result


def keep_labels(dataset: Dataset, fraction: float, *, seed: int, per: Sequence[str] = ("language",)) -> Dataset:
    """The same rows with all but a fraction of the labels hidden as -1.

    The kept labels are drawn at random in equal shares from each class in each group of rows with the same values in
    the columns `per`. Together they are `round(fraction * labeled rows)`, or a little more: with a fraction above 0
    every class keeps at least one label in each group that has it. The same data, seed and fraction give the same
    choice. Rows without a label stay so. In a set of words whole rows keep or lose their labels, in equal shares from
    each group.

    Args:
        dataset: one split.
        fraction: in [0, 1].
        seed: of the choice.
        per: columns that make the groups.

    Raises:
        UserError: a fraction outside [0, 1], or a column that does not exist.
    """
    if isinstance(dataset, DatasetDict):
        raise TypeError("keep_labels takes one split, for example data['train']")
    if not 0 <= fraction <= 1:
        raise UserError(f"fraction must be in [0, 1], not {fraction}")
    for name in ("label", *per):
        if name not in dataset.column_names:
            raise UserError(f"no column {name!r} in the data set; its columns are {dataset.column_names}")
    table = table_of(dataset)
    groups = [table[name] for name in per]
    if isinstance(dataset.features["label"], datasets.List):
        column = table["label"].combine_chunks()
        keeps = _draw(has_label(column), _group_numbers(groups, len(table)), fraction, seed)
        values = _hide(pc.list_flatten(column), np.repeat(keeps, pc.list_value_length(column).to_numpy()))
        labels = in_lists(values, column)
    else:
        column = table["label"]
        group = _group_numbers([*groups, column], len(table))
        labels = _hide(column, _draw(has_label(column.combine_chunks()), group, fraction, seed))
    table = table.set_column(table.column_names.index("label"), "label", labels)
    return dataset_of(table, dataset.features, dataset.split)


def _draw(labeled: np.ndarray, group: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """[N] bool: a fraction of the labeled rows of each group, at random."""
    rows = np.flatnonzero(labeled)
    # A random order, then grouped: the first rows of each group are those that keep the label.
    order = rows[np.random.default_rng(seed).permutation(len(rows))]
    order = order[np.argsort(group[order], kind="stable")]
    _, starts, sizes = np.unique(group[order], return_index=True, return_counts=True)
    keeps = np.zeros(len(labeled), dtype=bool)
    for start, quota in zip(starts, _quotas(sizes, fraction), strict=True):
        keeps[order[start : start + quota]] = True
    return keeps


def _quotas(sizes: np.ndarray, fraction: float) -> np.ndarray:
    """Whole rows of each group, at least one each, that add up to the fraction of all (largest remainder)."""
    exact = sizes * fraction
    quotas = np.maximum(np.floor(exact), 1 if fraction > 0 else 0).astype(np.int64)
    missing = max(0, round(float(exact.sum())) - int(quotas.sum()))
    quotas[np.argsort(quotas - exact, kind="stable")[:missing]] += 1
    return quotas


def _group_numbers(columns: Iterable[pa.ChunkedArray], n_rows: int) -> np.ndarray:
    """[N] integers, equal for rows that have the same values in all columns."""
    group = np.zeros(n_rows, dtype=np.int64)
    for column in columns:
        codes = value_codes(column)
        _, group = np.unique(group * (codes.max(initial=0) + 1) + codes, return_inverse=True)
    return group


def _hide(labels: pa.Array, keeps: np.ndarray) -> pa.Array:
    return pa.array(np.where(keeps, labels.to_numpy(), UNLABELED_INDEX))
