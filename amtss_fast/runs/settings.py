"""Settings as text: YAML files, and `key=value` overrides of what they hold."""

from __future__ import annotations

import copy
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import yaml

from amtss_fast.errors import UserError
from amtss_fast.runs.scalars import Written, core_value

_KEY = re.compile(r"[\w-]+(\.[\w-]+)*")
_PLAIN = "plain"
# YAML reads them as the end of a line.
_BREAKS = "\r\x85\u2028\u2029"
# Aliases of aliases make a huge mapping out of a small file.
_MOST_VALUES, _DEEPEST = 100_000, 50


def read_settings(text: str, origin: str) -> dict[str, Any]:
    """The mapping that a YAML file holds. Keys and scalars are texts; what had no quotes is a
    :class:`~amtss_fast.runs.scalars.Written`.

    Args:
        text: the contents of the file.
        origin: the name of the file, for messages.

    Raises:
        UserError: no YAML, no mapping, or a key that stands twice; with the line.
    """
    root = _compose(text, origin)
    if not isinstance(root, yaml.MappingNode):
        found = {yaml.ScalarNode: "a text", yaml.SequenceNode: "a list"}.get(type(root), "nothing")
        raise UserError(f"{origin} must hold a mapping of settings, found {found}")
    values = _Values(origin).of(root)
    assert isinstance(values, dict)
    return values


def apply_overrides(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of the settings in which each `key=value` override has replaced one value.

    The key is a dotted name, in which a number is a place in a list: `teachers.0.name=west`. Sections that do not exist
    are made; of two overrides of one key the last holds. The value is YAML: `data.languages=[en, sw]`,
    `data.label=null`.

    Raises:
        UserError: no `key=value`, a place that a list does not have, or a key inside of something that is no section.
    """
    settings = copy.deepcopy(dict(values))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not _KEY.fullmatch(key):
            raise UserError(f"an override must be key=value, got {override!r}")
        _set(settings, key, _override_value(text, key), override)
    return settings


def write_settings(values: Mapping[str, Any]) -> str:
    """The YAML from which :func:`read_settings` gets the same values, once their places have typed them."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=float("inf"))
    return text


def _override_value(text: str, key: str) -> Any:
    origin = f"override {key}={shorten(text)}"
    root = _compose(text, origin)
    if root is None:
        return Written("")
    if root.tag == _PLAIN:
        # As it stands: in an override ` #1` begins no comment.
        return Written(text.strip())
    return _Values(origin).of(root)


def _set(settings: dict[str, Any], key: str, value: Any, override: str) -> None:
    names, place = key.split("."), settings
    for depth, name in enumerate(names):
        step: Any = name
        if isinstance(place, list):
            if not (name.isascii() and name.isdigit()) or int(name) >= len(place):
                raise UserError(f"{override!r}: {name!r} must be a place in a list of {len(place)}, from 0")
            step = int(name)
        elif not isinstance(place, dict):
            raise UserError(f"{override!r}: {'.'.join(names[:depth])} is {core_value(place)!r}, not a section")
        if depth == len(names) - 1:
            place[step] = value
            return
        if isinstance(place, dict) and core_value(place.get(step)) is None:
            place[step] = {}
        place = place[step]


class _Nodes(yaml.BaseLoader):
    """Marks scalars that have neither quotes nor a tag."""

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode and implicit[0]:
            return _PLAIN
        return str(super().resolve(kind, value, implicit))


def _compose(text: str, origin: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, _Nodes)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        what = f"the character {chr(error.character)!r} is not allowed"
        raise UserError(f"{origin}, line {line} is not valid YAML: {what}") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None or "\n" not in text else f", line {mark.line + 1}"
        reasons = " ".join(filter(None, (error.context, error.problem)))
        hint = "; a text with such characters needs quotes" if isinstance(error, yaml.scanner.ScannerError) else ""
        raise UserError(f"{origin}{where} is not valid YAML: {' '.join(reasons.split())}{hint}") from error
    except RecursionError as error:
        raise UserError(f"{origin} is not valid YAML: it is nested too deeply") from error


class _Dumper(yaml.SafeDumper):
    """Writes texts in quotes where they could be anything else, and everything in full."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    quotes = None if isinstance(core_value(Written(text)), str) else "'"
    if any(mark in text for mark in _BREAKS):
        # Only there they are escaped.
        quotes = '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=quotes)


_Dumper.add_representer(str, _represent_text)


class _Values:
    """What the nodes of a document hold."""

    def __init__(self, origin: str) -> None:
        self._origin = origin
        self._count = 0

    def of(self, node: yaml.Node, path: tuple[str, ...] = ()) -> Any:
        self._count += 1
        if self._count > _MOST_VALUES or len(path) > _DEEPEST:
            raise self._error(node, "it holds too many values, or is nested too deeply (an alias inside of itself?)")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            self._check_tag(node, "seq")
            return [self.of(entry, (*path, str(place))) for place, entry in enumerate(node.value)]
        if node.tag == _PLAIN:
            return Written(node.value)
        if node.tag in (f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float", "null")):
            return Written(node.value)
        self._check_tag(node, "str")
        return node.value

    def _mapping(self, node: yaml.MappingNode, path: tuple[str, ...]) -> dict[str, Any]:
        self._check_tag(node, "map")
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        lines: dict[Hashable, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise self._error(key_node, "a key must be a text")
            key = key_node.value
            if key in lines:
                name = ".".join((*path, key))
                raise self._error(key_node, f"duplicate key {name}, it stands in line {lines[key]} too")
            lines[key] = key_node.start_mark.line + 1
            if key == "<<" and key_node.tag == _PLAIN:
                merged = self._merged(value_node, path)
            else:
                own[key] = self.of(value_node, (*path, key))
        return {**merged, **own}

    def _merged(self, node: yaml.Node, path: tuple[str, ...]) -> dict[str, Any]:
        """What `<<: *anchor` or `<<: [*one, *two]` adds; of two the first holds."""
        sections = node.value if isinstance(node, yaml.SequenceNode) else [node]
        values: dict[str, Any] = {}
        for section in sections:
            if not isinstance(section, yaml.MappingNode):
                raise self._error(section, "<< needs a mapping, or a list of them")
            values = {**self.of(section, (*path, "<<")), **values}
        return values

    def _check_tag(self, node: yaml.Node, kind: str) -> None:
        if node.tag != f"tag:yaml.org,2002:{kind}":
            raise self._error(node, f"tags such as {node.tag!r} are not supported")

    def _error(self, node: yaml.Node, problem: str) -> UserError:
        return UserError(f"{self._origin}, line {node.start_mark.line + 1} is not valid YAML: {problem}")


def shorten(text: str, most: int = 80) -> str:
    """The text in one line, cut where it is long."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[:most]}..."
