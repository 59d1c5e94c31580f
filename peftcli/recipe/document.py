"""YAML text -> plain values, each with its place in the file.

Numbers follow YAML 1.2 (`1e-4` is a number, `yes` is a string), duplicate keys and tags are
refused, and aliases cannot blow the document up.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import yaml

from peftcli.errors import RecipeError

Path = tuple[str | int, ...]
SET = "--set "
"""What the place of a value from the command line begins with."""
SHORT = {"method": "name", "model": "name", "data.train": "path", "data.eval": "path"}
"""Sections that a text can stand for, which is the value of this key."""
MAX_BYTES = 1_000_000
MAX_VALUES = 10_000  # after aliases are expanded
MAX_DEPTH = 32
MAX_EVENTS = 4 * MAX_VALUES  # before that; reading YAML is slow


@dataclass
class Document:
    """Values and, for each path in them, where it was written (`FILE:LINE:COLUMN`).

    `problems` holds what does not stop the reading: keys that are written twice.
    """

    name: str
    values: Any
    places: dict[Path, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def place(self, path: Path) -> str:
        """The place of the longest part of `path` that was written down."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return f"{self.name}:1:1"


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2's core schema."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {}  # type: ignore[misc]


for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9][0-9_]*$", list("-+0123456789")),
    (
        "float",
        r"^[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$"
        r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$",
        list("-+.0123456789"),
    ),
    ("merge", r"^<<$", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def read_document(text: str, name: str) -> Document:
    """Parse `text`; raises RecipeError with every syntax problem's place."""
    if len(text.encode()) > MAX_BYTES:
        raise RecipeError(f"{name}: larger than {MAX_BYTES:,} bytes; a recipe is a short file")
    try:
        _refuse_tags(text, name)
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        hint = " (indent with spaces, not tabs)" if "'\\t'" in str(error.problem) else ""
        raise RecipeError(
            f"{where}: not YAML: {error.problem}{hint}",
            "mend that place; brackets and quotes must close, and sections indent alike",
        ) from None
    except yaml.YAMLError as error:  # characters that YAML forbids
        raise RecipeError(f"{name}: not YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise RecipeError(f"{name}: nested deeper than {MAX_DEPTH} levels") from None
    if node is None:
        raise RecipeError(f"{name}:1:1: the recipe is empty", "start from one: peftcli recipes ls")
    document = Document(name, None)
    document.values = _Builder(document).build(node, (), 0)
    if not isinstance(document.values, dict):
        found = type(document.values).__name__
        raise RecipeError(
            f"{name}:1:1: a recipe is a mapping of sections, found a {found}",
            "start from one: peftcli recipes ls",
        )
    return document


def read_scalar(text: str) -> Any:
    """The value of one YAML scalar or flow collection, as `--set key=value` holds it."""
    found = read_document(f"value: {text}", SET.strip())
    if found.problems:
        raise RecipeError(f"{SET.strip()}: a key is written twice", "keep one of them")
    return found.values["value"]


def overridden(document: Document, texts: Iterable[str]) -> Document:
    """A copy with each `key.key=value` put in; raises RecipeError when one cannot be."""
    copied = copy.deepcopy(document)
    for text in texts:
        _override(copied, text)
    return copied


def _override(document: Document, text: str) -> None:
    """Put one `key.key=value` into the document; raises RecipeError when it is none."""
    key, equals, value = text.partition("=")
    keys = key.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(
            f"--set {text}: not KEY=VALUE", "for instance --set training.learning_rate=1e-4"
        )
    section = document.values
    for depth, part in enumerate(keys[:-1]):
        inner = section.setdefault(part, {})
        short = SHORT.get(dotted(tuple(keys[: depth + 1])))
        if isinstance(inner, str) and short:
            inner = section[part] = {short: inner}
        if not isinstance(inner, dict):
            raise RecipeError(
                f"--set {text}: `{dotted(tuple(keys[: depth + 1]))}` is not a section"
            )
        section = inner
    section[keys[-1]] = _value(text, value)
    path: Path = tuple(keys)
    for known in [place for place in document.places if place[: len(path)] == path]:
        del document.places[known]
    document.places[path] = f"{SET}{text}"


def _value(text: str, value: str) -> Any:
    """What a `--set` gives; its error names that `--set`, of which there can be several."""
    try:
        return read_scalar(value)
    except RecipeError as error:
        reason = error.message.partition(": ")[2]
        raise RecipeError(f"{SET}{text}: {reason}", error.hint) from None


def _refuse_tags(text: str, name: str) -> None:
    documents = depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=_Loader)):
        mark = event.start_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        if number > MAX_EVENTS:
            raise RecipeError(f"{place}: more than {MAX_VALUES:,} values; a recipe is short")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH + 1:
            raise RecipeError(f"{place}: nested deeper than {MAX_DEPTH} levels")
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise RecipeError(f"{place}: a second document; a recipe is one document")
        if isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent) and event.tag:
            raise RecipeError(f"{place}: YAML tag `{event.tag}` is not allowed; remove it")


class _Builder:
    """Walks the node tree; shared nodes (aliases) are expanded and counted each time."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.count = 0

    def build(self, node: yaml.Node, path: Path, depth: int) -> Any:
        self.count += 1
        place = self._place(node)
        if self.count > MAX_VALUES:
            raise RecipeError(f"{place}: more than {MAX_VALUES:,} values after expanding aliases")
        if depth > MAX_DEPTH:
            raise RecipeError(f"{place}: nested deeper than {MAX_DEPTH} levels")
        self.document.places.setdefault(path, place)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*path, i), depth + 1) for i, item in enumerate(node.value)]
        _check_characters(node.value, place)
        return _scalar(node)

    def _mapping(self, node: yaml.MappingNode, path: Path, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = self._place(key_node)
            if key_node.tag == "tag:yaml.org,2002:merge":
                merged = self._merged(value_node, path, depth) | merged
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError(f"{place}: a key must be a word")
            key = str(key_node.value)
            _check_characters(key, place)
            if key in values:
                self.document.problems.append(
                    f"{place}: {dotted((*path, key))}: written twice in the same section; "
                    f"the first is at {self.document.place((*path, key))}; keep one"
                )
                continue
            self.document.places[(*path, key)] = place
            values[key] = self.build(value_node, (*path, key), depth + 1)
        return merged | values

    def _merged(self, node: yaml.Node, path: Path, depth: int) -> dict[str, Any]:
        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        merged: dict[str, Any] = {}
        for part in parts:
            if not isinstance(part, yaml.MappingNode):
                raise RecipeError(f"{self._place(part)}: `<<` takes a mapping")
            merged = self._mapping(part, path, depth + 1) | merged
        return merged

    def _place(self, node: yaml.Node) -> str:
        mark = node.start_mark
        return f"{self.document.name}:{mark.line + 1}:{mark.column + 1}"


def _check_characters(text: str, place: str) -> None:
    """Escapes can write halves of characters, which no file can hold."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise RecipeError(
            f"{place}: holds half of a surrogate pair (\\ud800 to \\udfff)",
            "write the character itself",
        )


def _scalar(node: yaml.Node) -> Any:
    kind = node.tag.rpartition(":")[2]
    text = node.value
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        digits = text.replace("_", "")
        return int(digits) if len(digits) < 400 else digits
    if kind == "float":
        return float(text.lower().replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
    return text


def dotted(path: Path) -> str:
    """A path as users write it: `training.learning_rate`."""
    return ".".join(str(part) for part in path)
