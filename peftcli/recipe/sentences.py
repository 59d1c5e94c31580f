"""One wrong key -> a sentence: what is wrong with it, and what to write."""

from __future__ import annotations

import json
from difflib import get_close_matches
from typing import Any

from pydantic_core import ErrorDetails

from peftcli.methods import METHODS
from peftcli.recipe.document import Document, Path
from peftcli.recipe.keys import unknown_key

# What a recipe cannot be without.
EXAMPLES: dict[Path, Any] = {
    ("model",): "Qwen/Qwen3-8B",
    ("model", "name"): "Qwen/Qwen3-8B",
    ("method",): "lora",
    ("method", "name"): "lora",
    ("data",): {"train": "rows.jsonl"},
    ("data", "train"): "rows.jsonl",
    ("output",): "runs/my-run",
}
_FULL_NAMES = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32"}
_KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a section of keys",
    "model_type": "a section of keys",
    "model_attributes_type": "a section of keys",
    "none_required": "null",
}
_LIMITS = {
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "finite_number": "must be a finite number",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
}
_FOUND = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a section",
    type(None): "nothing",
}


def sentence(details: list[ErrorDetails], path: Path, document: Document) -> str:
    """What is wrong at `path`; `details` are the complaints of every branch of its type."""
    first = details[0]
    kind, value, context = first["type"], first["input"], first.get("ctx", {})
    if kind == "extra_forbidden":
        return unknown_key(path, document)
    if kind == "missing":
        return _missing(path)
    if kind == "value_error":
        return str(context["error"])
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _method(value)
    if path == ("data", "eval") and not isinstance(value, float):
        shown = f"{_FOUND.get(type(value), 'something else')} {_short(value)}"
        return f"expected a share such as `5%`, a file, a list of sources or null, found {shown}"
    if all(is_branch(detail) for detail in details):
        return _wrong_type(details, value)
    bound = next((detail for detail in details if detail["type"] in _LIMITS), first)
    limit = _limit(bound["type"], bound.get("ctx", {}), bound["msg"])
    return f"{limit}, found {_short(value)}"


def is_branch(detail: ErrorDetails) -> bool:
    """Whether the value is not of the type of one branch of a union."""
    return detail["type"] in _KINDS or detail["type"] == "literal_error"


def _missing(path: Path) -> str:
    if path[-1] == "name" and "method" in path:
        return _method({})
    example = EXAMPLES.get(path)
    if not isinstance(example, str):
        return "missing; every recipe has it"
    return f"missing; write `{path[-1]}: {example}`"


def _method(value: Any) -> str:
    name = value.get("name") if isinstance(value, dict) else value
    names = ", ".join(METHODS)
    if name is None:
        return f"missing; write `name:` and one of {names}"
    near = get_close_matches(str(name).lower(), METHODS, n=1)
    guess = f"did you mean `{near[0]}`? The" if near else "the"
    return f"no method is called {_short(name)}; {guess} methods are {names}"


def _wrong_type(details: list[ErrorDetails], value: Any) -> str:
    choices: list[str] = []
    kinds: list[str] = []
    for detail in details:
        if detail["type"] == "literal_error":
            choices += _choices(detail["ctx"]["expected"])
        elif _KINDS[detail["type"]] not in kinds:
            kinds.append(_KINDS[detail["type"]])
    if isinstance(value, str) and choices:
        short = value.lower()
        near = get_close_matches(_FULL_NAMES.get(short, short), choices, n=1, cutoff=0.6)
        guess = f"; did you mean `{near[0]}`?" if near else ""
        return f"{_short(value)} is none of {', '.join(choices + kinds)}{guess}"
    expected = " or ".join([*kinds, *(f"`{choice}`" for choice in choices)])
    if value is None:
        return f"expected {expected}, found nothing; write a value, or remove the key"
    quotes = "; put it in quotes" if kinds == ["text"] and isinstance(value, int | float) else ""
    shown = f"{_FOUND.get(type(value), 'something else')} {_short(value)}"
    return f"expected {expected}, found {shown}{quotes}"


def _choices(expected: str) -> list[str]:
    return [part.strip(" '") for part in expected.replace(" or ", ", ").split(",")]


def _limit(kind: str, context: dict[str, Any], message: str) -> str:
    return _LIMITS[kind].format(**context) if kind in _LIMITS else message


def _short(value: Any) -> str:
    plain = value is None or isinstance(value, bool)
    text = f"`{json.dumps(value) if plain else value}`"
    return text if len(text) < 60 else text[:56] + "...`"
