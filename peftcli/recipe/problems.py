"""Pydantic's complaints -> `FILE:LINE:COLUMN: key: what is wrong; what to write`."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from peftcli.methods.base import Conflict
from peftcli.recipe.document import SET, Document, Path, dotted
from peftcli.recipe.sentences import EXAMPLES, is_branch, sentence


def problems_of(error: ValidationError, document: Document, values: Any) -> dict[Path, str]:
    """Each wrong key with its sentence; `values` are those of the document that were judged."""
    by_path: dict[Path, list[ErrorDetails]] = {}
    found: dict[Path, str] = {}
    for detail in error.errors():
        path = _written(detail["loc"], detail["type"], values)
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, Conflict):
            found |= {(*path, *keys): text for keys, text in cause.found}
        else:
            by_path.setdefault(path, []).append(detail)
    for path in list(by_path):  # a union's other branches complain above the real problem
        below = [p for p in by_path if len(p) > len(path) and p[: len(path)] == path]
        counted = ("too_short", "tuple_type")  # wrong items do not count as items
        if below and all(is_branch(x) or x["type"] in counted for x in by_path[path]):
            del by_path[path]
    return found | {path: sentence(details, path, document) for path, details in by_path.items()}


def place_of(path: Path, document: Document) -> str:
    """Where it was written; of a section that is wrong for its name, the `--set` of that."""
    name = document.place((*path, "name"))
    return name if name.startswith(SET) else document.place(path)


def problem_lines(problems: Mapping[Path, str], document: Document) -> list[str]:
    """One line for each problem, in the order of the file."""
    lines = [
        (place_of(path, document), f"{dotted(path) or 'recipe'}: {text}")
        for path, text in problems.items()
    ]
    return [f"{place}: {line}" for place, line in sorted(lines, key=lambda item: _order(item[0]))]


def without(values: Any, paths: Iterable[Path]) -> Any:
    """A copy of the values in which defaults, or examples, stand at `paths`.

    So the rest of a recipe can be judged although something in it is wrong.
    """
    rest = copy.deepcopy(values)
    for path in filter(None, paths):
        inner = rest
        for part in path[:-1]:
            inside = isinstance(inner, dict) and part in inner
            known = inside or (isinstance(inner, list) and isinstance(part, int))
            inner = inner[part] if known and inner else None
        if isinstance(inner, dict):
            inner.pop(path[-1], None)
            if path in EXAMPLES:
                inner[path[-1]] = copy.deepcopy(EXAMPLES[path])
        elif isinstance(inner, list) and isinstance(path[-1], int):
            inner[path[-1]] = "an example"
    return rest


def _order(place: str) -> tuple[int, int]:
    parts = place.rsplit(":", 2)
    if len(parts) == 3 and parts[1].isdecimal() and parts[2].isdecimal():
        return int(parts[1]), int(parts[2])
    return 0, 0


def _written(loc: tuple[int | str, ...], kind: str, values: Any) -> Path:
    """`loc` without the parts pydantic adds (union branches, wrapped lists)."""
    path: list[int | str] = []
    for part in loc:
        inside_mapping = isinstance(values, dict) and part in values
        inside_list = isinstance(values, list) and isinstance(part, int) and part < len(values)
        if inside_mapping or inside_list:
            path.append(part)
            values = values[part]
    if kind == "missing":
        path.append(loc[-1])
    return tuple(path)
