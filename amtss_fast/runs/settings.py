"""Settings as text: YAML files, and `key=value` overrides of what they hold.

OmegaConf reads both: `1e-5` is a number, a date is a text, and a key that stands twice is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from amtss_fast.errors import UserError

_KEY = re.compile(r"[\w-]+(\.[\w-]+)*")
# Booleans, octal numbers (017 is 15) and numbers to the base of 60 (1:30 is 90) that YAML 1.2 no longer has.
_YAML_1_1 = re.compile(r"yes|no|on|off|[-+]?0[0-7_]+|[-+]?\d[\d_]*(:\d+)+(\.\d*)?", re.IGNORECASE)


def read_settings(text: str, origin: str) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Only `true` and `false` are booleans, as in YAML 1.2: the language `no` is a text. So are 017 and 1:30.

    Args:
        text: the contents of the file.
        origin: the name of the file, for messages.

    Raises:
        UserError: no YAML, no mapping, or `${...}`.
    """
    values = _parse(text, origin)
    if not isinstance(values, dict):
        raise UserError(f"{origin} must hold a mapping, found {type(values).__name__}")
    return values


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of the settings in which each `key=value` override has replaced one value.

    The key is a dotted name, in which a number is a place in a list: `teachers.0.name=west`. Sections that do not exist
    are made. The value is YAML: `data.languages=[en, sw]`, `data.label=null`.

    Raises:
        UserError: no `key=value`, a place that a list does not have, or a key inside of something that is no section.
    """
    settings = OmegaConf.create(dict(values))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not _KEY.fullmatch(key):
            raise UserError(f"an override must be key=value, got {override!r}")
        try:
            _check_place(settings, key.split("."), override)
            OmegaConf.update(settings, key, _parse(text, repr(override)), merge=False)
        except OmegaConfBaseException as error:
            raise UserError(f"{override!r}: {error}") from error
    changed = OmegaConf.to_container(settings)
    assert isinstance(changed, dict)
    return {str(key): value for key, value in changed.items()}


def _parse(text: str, origin: str) -> Any:
    if "${" in text:
        raise UserError(f"{origin}: references (${{...}}) are not supported; write the value, or use a YAML anchor")
    try:
        # A dotlist, because only there OmegaConf reads any YAML: a number, a text, a list, a mapping.
        values = OmegaConf.from_dotlist([f"value={_quote(text)}"])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{origin} is not valid YAML: {error}") from error
    container = OmegaConf.to_container(values)
    assert isinstance(container, dict)
    return container["value"]


def _quote(text: str) -> str:
    """The YAML with quotes around what YAML 1.1 alone, which OmegaConf reads, takes for booleans and numbers."""
    for token in reversed(list(yaml.scan(text))):
        if isinstance(token, yaml.ScalarToken) and token.plain and _YAML_1_1.fullmatch(token.value):
            text = f'{text[: token.start_mark.index]}"{token.value}"{text[token.end_mark.index :]}'
    return text


def _check_place(settings: Any, names: Sequence[str], override: str) -> None:
    """Refuses what `OmegaConf.update` would accept: it replaces a value by a section where a key needs one."""
    place = settings
    for depth, name in enumerate(names):
        if OmegaConf.is_list(place):
            if not name.isdigit() or int(name) >= len(place):
                raise UserError(f"{override!r}: {name!r} must be a place in a list of {len(place)}, from 0")
            place = place[int(name)]
        elif OmegaConf.is_dict(place):
            place = place.get(name)
        elif place is None:
            return
        else:
            raise UserError(f"{override!r}: {'.'.join(names[:depth])} is {place!r}, not a section")
