"""Models with the weights of a checkpoint, which must be those that its configuration asks for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from amtss_fast.errors import UserError
from amtss_fast.models.places import check_index, loading

_MOST_NAMES = 4


def load_model(
    kind: Any, name_or_path: str | Path, *, whose: str, new_head: bool = False, dry: bool = False, **options: Any
) -> Any:
    """A model of a folder or Hub id: safetensors only, and no code of the checkpoint runs.

    transformers only warns of weights that are missing (it draws them at random) and of layers that the configuration
    does not have (it leaves them out).

    Args:
        kind: the class that loads it, such as an auto class.
        name_or_path: a folder or Hub id.
        whose: what messages call the model.
        new_head: weights outside of the base model may be missing or of another shape; they are drawn at random.
        dry: everything is checked, but the weights stay on the meta device, which takes no time and memory.
        **options: of `from_pretrained`.

    Raises:
        FileNotFoundError: a path without a folder.
        UserError: no such model there, or weights that do not fit the configuration; the message names them.
        ImportError: a package that the model needs is missing.
    """
    if dry:
        options["device_map"] = "meta"
    with loading(whose, name_or_path) as place:
        check_index(place)
        with _quiet(dry):
            model, info = kind.from_pretrained(
                place,
                **options,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                # They are told below, by name.
                ignore_mismatched_sizes=True,
            )
        check_weights(model, info, new_head=new_head)
    return model


def check_weights(model: PreTrainedModel, info: Mapping[str, Any], *, new_head: bool = False) -> None:
    """Refuses a model whose checkpoint did not hold its weights, by what `from_pretrained` found.

    Raises:
        UserError: weights that are missing, of another shape, or of layers that the configuration does not have.
    """
    inside = f"{model.base_model_prefix}." if new_head and model.base_model is not model else ""
    missing = sorted(key for key in info["missing_keys"] if key.startswith(inside))
    if missing:
        raise UserError(f"its checkpoint is no {type(model).__name__}: it lacks {_few(missing)}")
    shapes = sorted((str(key), list(is_), list(asked)) for key, is_, asked in info["mismatched_keys"])
    wrong = [f"{key} is {is_}, not {asked}" for key, is_, asked in shapes if key.startswith(inside)]
    if wrong:
        raise UserError(
            f"the weights of {type(model).__name__} do not have the shapes that config.json asks for "
            f"({_told_sizes(model, shapes)}): {_few(wrong)}"
        )
    known = {_pattern(model, key) for key in model.state_dict()}
    more = sorted(key for key in info["unexpected_keys"] if _pattern(model, key) in known)
    if more:
        raise UserError(f"its checkpoint has layers that config.json leaves out: {_few(more)}")


def _told_sizes(model: PreTrainedModel, shapes: list[tuple[str, list[int], list[int]]]) -> str:
    """The sizes in the configuration that may be wrong: the labels for a head, else widths."""
    prefix = f"{model.base_model_prefix}."
    labels = model.config.id2label
    if labels and all(not key.startswith(prefix) and asked[0] == len(labels) for key, _, asked in shapes):
        return f"id2label names {len(labels)} outputs, {labels}"
    text_config = model.config.get_text_config()
    sizes = {name: getattr(text_config, name, None) for name in ("vocab_size", "hidden_size")}
    return ", ".join(f"{name} {value}" for name, value in sizes.items())


def _pattern(model: PreTrainedModel, key: str) -> str:
    """A weight's name without the model's prefix and without the numbers of layers."""
    return re.sub(r"\.\d+\.", ".N.", key.removeprefix(f"{model.base_model_prefix}."))


def _few(names: list[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


@contextmanager
def _quiet(dry: bool) -> Iterator[None]:
    """Without transformers' table of weights, which become an error, and in a dry run without its progress bar."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if dry:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if dry and bar:
            logging.enable_progress_bar()
