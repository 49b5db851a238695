"""Rows, and the files that hold them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features

NLI = ["entailment", "neutral", "contradiction"]
ROWS: list[dict[str, Any]] = [
    {"text": "a red apple", "label": "good", "language": "en"},
    {"text": "NA", "label": "bad", "language": "en"},
    {"text": "paka, mwekundu\nna mzuri", "label": None, "language": "sw"},
    {"text": "2020-01-01", "label": "good", "language": "sw"},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes rows in the format that the path's suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".jsonl", ".json", ".ndjson"):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".tsv":
        # Quotes are characters like others, and no value has a tab or a line end.
        lines = [[*rows[0]], *([str("" if v is None else v) for v in row.values()] for row in rows)]
        path.write_text("".join("\t".join(line) + "\n" for line in lines), "utf-8", newline="")
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def translations(count: int = 4) -> Dataset:
    """XNLI's `all_languages` configuration in small: premise and hypothesis in three languages."""
    codes = ["en", "sw", "ur"]
    features = Features(
        {
            "premise": datasets.Translation(languages=codes),
            "hypothesis": datasets.TranslationVariableLanguages(languages=codes),
            "label": ClassLabel(names=NLI),
        }
    )
    rows = {
        "premise": [{code: f"premise {i} {code}" for code in codes} for i in range(count)],
        # Each row in another order of languages.
        "hypothesis": [
            {
                "language": [codes[(i + j) % 3] for j in range(3)],
                "translation": [f"hypothesis {i} {codes[(i + j) % 3]}" for j in range(3)],
            }
            for i in range(count)
        ],
        "label": [i % 3 for i in range(count)],
    }
    return Dataset.from_dict(rows, features=features)
