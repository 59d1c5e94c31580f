"""Pydantic's complaints -> `FILE:LINE:COLUMN: key: what is wrong; what to write`."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from peftcli.methods import METHODS
from peftcli.methods.base import Conflict
from peftcli.recipe.document import Document, Path, dotted
from peftcli.recipe.schema import SECTIONS, Recipe

# What other tools call it, and what it is called here.
FOREIGN_KEYS = {
    "base_model": "model",
    "model_name_or_path": "model",
    "r": "method.rank",
    "lora_r": "method.rank",
    "lora_rank": "method.rank",
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    "lora_target": "method.target_modules",
    "lora_target_modules": "method.target_modules",
    "layers_to_transform": "method.layers",
    "init_lora_weights": "method.init",
    "adapter": "method.name",
    "finetuning_type": "method.name",
    "load_in_4bit": "method: {name: qlora}",
    "use_double_quant": "method.double_quantization",
    "dataset": "data.train",
    "datasets": "data.train",
    "train_file": "data.train",
    "val_size": "data.eval",
    "val_set_size": "data.eval",
    "max_seq_length": "data.max_length",
    "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "template": "data.chat_template",
    "lr": "training.learning_rate",
    "num_train_epochs": "training.epochs",
    "num_epochs": "training.epochs",
    "per_device_train_batch_size": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.batch_size (the effective batch)",
    "lr_scheduler_type": "training.schedule",
    "lr_scheduler": "training.schedule",
    "warmup_ratio": "training.warmup",
    "warmup_steps": "training.warmup",
    "optim": "training.optimizer",
    "gradient_checkpointing": "training.checkpointing",
    "sample_packing": "training.packing",
    "eval_steps": "evaluation.steps",
    "early_stopping_patience": "evaluation.early_stopping",
    "output_dir": "output",
}
# What a recipe cannot be without.
_EXAMPLES: dict[Path, Any] = {
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
        if below and all(_is_branch(x) or x["type"] in counted for x in by_path[path]):
            del by_path[path]
    return found | {path: _sentence(details, path, document) for path, details in by_path.items()}


def problem_lines(problems: Mapping[Path, str], document: Document) -> list[str]:
    """One line for each problem, in the order of the file."""
    lines = [
        (document.place(path), f"{dotted(path) or 'recipe'}: {text}")
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
            if path in _EXAMPLES:
                inner[path[-1]] = copy.deepcopy(_EXAMPLES[path])
        elif isinstance(inner, list) and isinstance(path[-1], int):
            inner[path[-1]] = "an example"
    return rest


def _order(place: str) -> tuple[int, int]:
    parts = place.rsplit(":", 2)
    if len(parts) == 3 and parts[1].isdecimal() and parts[2].isdecimal():
        return int(parts[1]), int(parts[2])
    return 0, 0


def _is_branch(detail: ErrorDetails) -> bool:
    return detail["type"] in _KINDS or detail["type"] == "literal_error"


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


def _sentence(details: list[ErrorDetails], path: Path, document: Document) -> str:
    first = details[0]
    kind, value, context = first["type"], first["input"], first.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(path, document)
    if kind == "missing":
        return _missing(path)
    if kind == "value_error":
        return str(context["error"])
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _method(value)
    if path == ("data", "eval") and not isinstance(value, float):
        shown = f"{_FOUND.get(type(value), 'something else')} {_short(value)}"
        return f"expected a share such as `5%`, a file, a list of sources or null, found {shown}"
    if all(_is_branch(detail) for detail in details):
        return _wrong_type(details, value)
    bound = next((detail for detail in details if detail["type"] in _LIMITS), first)
    limit = _limit(bound["type"], bound.get("ctx", {}), bound["msg"])
    return f"{limit}, found {_short(value)}"


def _unknown_key(path: Path, document: Document) -> str:
    key = str(path[-1])
    known = _fields(path[:-1], document)
    if path[0] == "method" and _owners(key):
        own = _method_name(document)
        return f"`{own}` has no such key; it belongs to {' and '.join(_owners(key))}"
    section, dot, inner = key.partition(".")
    if dot and section in known:
        return f"unknown key; write `{inner}` on a line of its own below `{section}:`"
    near = get_close_matches(key, known, n=1, cutoff=0.6)
    if near:
        return f"unknown key; did you mean `{near[0]}`?"
    if key in FOREIGN_KEYS:
        return f"unknown key; here it is `{FOREIGN_KEYS[key]}`"
    elsewhere = [dotted(place) for place in _all_keys() if place[-1] == key]
    if elsewhere:
        return f"unknown key here; it belongs at `{elsewhere[0]}`"
    return f"unknown key; the keys here are {', '.join(known)}"


def _missing(path: Path) -> str:
    if path[-1] == "name" and "method" in path:
        return _method({})
    example = _EXAMPLES.get(path)
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


def _fields(path: Path, document: Document) -> list[str]:
    """The keys that the schema knows in the section at `path`."""
    names = [part for part in path if isinstance(part, str)]
    if not names:
        return list(Recipe.model_fields)
    if names[0] == "method":
        method = METHODS.get(_method_name(document), METHODS["lora"])
        return list(method.model_fields)
    return list(SECTIONS[names[-1]].model_fields) if names[-1] in SECTIONS else []


def _method_name(document: Document) -> str:
    method = document.values.get("method")
    return str(method.get("name")) if isinstance(method, dict) else str(method)


def _owners(key: str) -> list[str]:
    return [name for name, method in METHODS.items() if key in method.model_fields]


def _all_keys() -> list[Path]:
    keys: list[Path] = [(key,) for key in Recipe.model_fields]
    for name in ("model", "data", "training", "evaluation"):
        keys += [(name, key) for key in SECTIONS[name].model_fields]
    return [*keys, *(("method", key) for method in METHODS.values() for key in method.model_fields)]
