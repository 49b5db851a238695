"""Where a configuration, a tokenizer or a model is loaded from: a folder or a Hub id, and the errors of loading.

Libraries notice what is wrong with a checkpoint in many ways (OSError, SafetensorError, KeyError, and so on). Here each
becomes one line that says whose checkpoint it is, where it is, and what is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import CONFIG_NAME

from amtss_fast._compat.transformers import may_be_hub_id
from amtss_fast.errors import UserError

INDEX = "model.safetensors.index.json"
_MOST_CHARACTERS = 400


@contextmanager
def loading(whose: str, name_or_path: str | Path) -> Iterator[str]:
    """Around code that loads something from a folder or Hub id; gives the place, `~` expanded.

    Args:
        whose: what messages call the owner: `teacher 'vera'`, `student.encoder`.
        name_or_path: a folder or Hub id. A `Path` is a folder.

    Raises:
        FileNotFoundError: a path without a folder.
        UserError: any error of the code inside, as one line.
        ImportError: a package that is missing.
    """
    place = find_place(whose, name_or_path)
    with told_of(f"{whose} ({place})", place if not Path(place).is_dir() else None):
        yield place


@contextmanager
def told_of(what: str, hub_id: str | None = None) -> Iterator[None]:
    """Around code that fails only by what a user gave; its errors become one line that begins with `what`.

    Args:
        what: the thing, with its place.
        hub_id: where the code loads by this name from the Hub: it is named where the Hub does not give it.

    Raises:
        UserError: any error but those below.
        FileNotFoundError: a file or folder that is missing.
        ImportError: a package that is missing.
        MemoryError, torch.OutOfMemoryError: as they are.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except UserError as error:
        raise type(error)(f"{what}: {error}") from error
    except ImportError as error:
        raise ImportError(f"{what}: {reason(error)}") from error
    except OSError as error:
        if hub_id is not None:
            raise UserError(f"{what}: it is no folder here, and the Hub did not give it: {reason(error)}") from error
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else UserError
        raise kind(f"{what}: {reason(error)}") from error
    # Tokenizers raise plain exceptions, others KeyError, AttributeError or their own kinds.
    except Exception as error:
        raise UserError(f"{what}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """An error's message as one short line, with its type where the message alone says little."""
    text = " ".join(str(error).split("Model type should be one of")[0].split())
    if len(text) > _MOST_CHARACTERS:
        text = f"{text[:_MOST_CHARACTERS]} ..."
    plain = type(error) in (ValueError, OSError, RuntimeError, ImportError, FileNotFoundError)
    return text if plain and text else f"{type(error).__name__}: {text}"


def find_place(whose: str, name_or_path: str | Path) -> str:
    """The folder, `~` expanded, or the Hub id.

    Raises:
        FileNotFoundError: a path without a folder.
        UserError: a file.
    """
    text = str(name_or_path)
    path = Path(text).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists():
        raise UserError(f"{whose}: {path} is a file; give the folder of a model")
    if not isinstance(name_or_path, Path) and may_be_hub_id(text):
        return text
    raise FileNotFoundError(f"{whose}: there is no folder {path}")


def read_model_config(name_or_path: str | Path, *, whose: str) -> PretrainedConfig:
    """The configuration of a folder or Hub id; no code of a checkpoint runs.

    Raises:
        FileNotFoundError, UserError: as :func:`loading`.
    """
    with loading(whose, name_or_path) as place:
        if Path(place).is_dir() and not (Path(place) / CONFIG_NAME).is_file():
            raise UserError(f"the folder holds no {CONFIG_NAME}")
        values, _ = PretrainedConfig.get_config_dict(place)
        _check_labels(values.get("id2label"))
        config: PretrainedConfig = AutoConfig.from_pretrained(place, trust_remote_code=False)
    return config


def _check_labels(id2label: Any) -> None:
    """Refuses names of labels that are not told by ids; libraries say no more than that something is no number."""
    if id2label is None:
        return
    if not isinstance(id2label, dict) or not all(
        str(index).removeprefix("-").isdecimal() and isinstance(name, str) for index, name in id2label.items()
    ):
        raise UserError(f"id2label must map ids, 0 to C - 1, to names, got {id2label}")


def check_index(place: str) -> None:
    """Refuses a folder whose index of shards names files outside of it, or files that are missing.

    Raises:
        UserError: naming the files.
    """
    index = Path(place) / INDEX
    if not index.is_file():
        return
    shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    names = sorted({str(name) for name in shards})
    outside = [name for name in names if Path(name).name != name or PureWindowsPath(name).name != name]
    if outside:
        raise UserError(f"{INDEX} names files outside of the folder: {', '.join(outside[:3])}")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise UserError(f"{INDEX} names files that are missing: {', '.join(missing[:3])}")
