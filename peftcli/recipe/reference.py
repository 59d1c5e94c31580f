"""The schema for editors and the README's reference of every key, both from the docstrings."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from pydantic import BaseModel

from peftcli.methods import METHODS
from peftcli.recipe.schema import SECTIONS, Recipe

SCHEMA_URL = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> str:
    """JSON Schema of a recipe, with the description of every key."""
    schema = Recipe.model_json_schema()
    models: list[type[BaseModel]] = [Recipe, *SECTIONS.values(), *METHODS.values()]
    by_name = {model.__name__: model for model in models}
    for name, part in [("Recipe", schema), *schema.get("$defs", {}).items()]:
        if name in by_name:
            texts = descriptions(by_name[name])
            for key, entry in part.get("properties", {}).items():
                entry["description"] = texts.get(key, "")
    _allow_short_forms(schema)
    return json.dumps({"$schema": SCHEMA_URL, "title": "peftcli recipe", **schema}, indent=2)


def descriptions(model: type[BaseModel]) -> dict[str, str]:
    """Key -> the docstring below it, base classes included."""
    found: dict[str, str] = {}
    for part in reversed(model.__mro__):
        if issubclass(part, BaseModel) and part is not BaseModel:
            found |= dict(_docstrings(part))
    return found


def reference() -> str:
    """The README's tables: every section, key, type, default and description."""
    parts = [_table("recipe", Recipe)]
    for name in ("model", "data", "training", "evaluation", "gates"):
        parts.append(_table(name, SECTIONS[name]))
    parts.append(_table("data.train / data.eval (one source)", SECTIONS["train"]))
    parts += [_table(f"method: {name}", method) for name, method in METHODS.items()]
    return "\n".join(parts)


def _table(title: str, model: type[BaseModel]) -> str:
    texts = descriptions(model)
    schema = model.model_json_schema()
    rows = [f"#### `{title}`", "", "| key | values | default | what |", "|---|---|---|---|"]
    for key, field in model.model_fields.items():
        values = _values(schema["properties"][key]).replace("|", "\\|")
        value = field.get_default(call_default_factory=True)
        default = "required" if field.is_required() else f"`{_plain(value)}`"
        rows.append(f"| `{key}` | {values} | {default} | {texts.get(key, '')} |")
    return "\n".join([*rows, ""])


def _plain(value: Any) -> str:
    """A default as a recipe would write it."""
    if isinstance(value, BaseModel):
        return "see below"
    if isinstance(value, str):
        return value
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def _values(entry: dict[str, Any]) -> str:
    if "enum" in entry:
        return ", ".join(f"`{choice}`" for choice in entry["enum"])
    if "const" in entry:
        return f"`{entry['const']}`"
    for key in ("anyOf", "oneOf"):
        if key in entry:
            return " or ".join(dict.fromkeys(_values(part) for part in entry[key]))
    if "$ref" in entry:
        return "section"
    kinds = {"integer": "whole number", "array": "list", "object": "mapping", "null": "null"}
    kind = str(entry.get("type", "any"))
    return kinds.get(kind, kind) + _bounds(entry)


def _bounds(entry: dict[str, Any]) -> str:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {entry[key]:g}" for key, sign in signs.items() if key in entry]
    return f" ({', '.join(limits)})" if limits else ""


def _docstrings(model: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """The string after each annotated assignment of a class body."""
    body = ast.parse(textwrap.dedent(inspect.getsource(model))).body[0]
    statements = body.body if isinstance(body, ast.ClassDef) else []
    for field, text in pairwise(statements):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            yield field.target.id, " ".join(str(text.value.value).split())


def _allow_short_forms(schema: dict[str, Any]) -> None:
    """What the validators accept beside the types: names for sections, strings for lists, `5%`."""
    share = {"type": "string", "pattern": r"^\s*[0-9.]+\s*%\s*$"}
    source = {"$ref": "#/$defs/Source"}
    recipe, parts = schema["properties"], schema["$defs"]
    for key in ("model", "method"):
        text = recipe[key].pop("description")
        names = {"enum": list(METHODS)} if key == "method" else {}
        recipe[key] = {"description": text, "anyOf": [{"type": "string", **names}, recipe[key]]}
    listed = {"type": "array", "items": {"anyOf": [{"type": "string"}, source]}, "minItems": 1}
    forms = [{"type": "string"}, source, listed]
    data = parts["Data"]["properties"]
    data["train"] = {"description": data["train"]["description"], "anyOf": forms}
    numbers = [{"type": "number"}, {"type": "null"}]
    data["eval"] = {
        "description": data["eval"]["description"],
        "anyOf": [*forms, *numbers],
        "default": 0.05,
    }
    warmup = parts["Training"]["properties"]["warmup"]
    for key in ("type", "ge"):  # pydantic leaves the bound under its own name here
        warmup.pop(key)
    warmup["anyOf"] = [{"type": "number", "minimum": 0}, share]
