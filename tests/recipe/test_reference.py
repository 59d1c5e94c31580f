"""The schema for editors and the README's tables say what the program really accepts."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel

from peftcli.methods import METHODS
from peftcli.recipe.document import read_document
from peftcli.recipe.gallery import Entry, entries
from peftcli.recipe.reference import descriptions, json_schema, reference
from peftcli.recipe.schema import SECTIONS, Recipe

SCHEMA: dict[str, Any] = json.loads(json_schema())
VALIDATOR = Draft202012Validator(SCHEMA)
MODELS: list[type[BaseModel]] = [Recipe, *SECTIONS.values(), *METHODS.values()]
GOOD = {
    "model": "bundled:tiny",
    "method": "lora",
    "data": {"train": "rows.jsonl"},
    "output": "runs/x",
}


def problems(changes: dict[str, Any]) -> list[str]:
    """What an editor would underline, as dotted places."""
    found = VALIDATOR.iter_errors(GOOD | changes)
    return [".".join(map(str, error.absolute_path)) or "recipe" for error in found]


def test_the_schema_is_a_schema() -> None:
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.name)
def test_it_accepts_the_gallery(entry: Entry) -> None:
    values = read_document(entry.path.read_text("utf-8"), entry.name).values
    assert [error.message for error in VALIDATOR.iter_errors(values)] == []


@pytest.mark.parametrize(
    "changes",
    [
        {"method": {"name": "qlora", "rank": 8}, "model": {"name": "x", "dtype": "bfloat16"}},
        {"data": {"train": ["a.jsonl", {"path": "b.csv", "weight": 0.5}], "eval": "5%"}},
        {"data": {"train": {"path": "a.jsonl", "labels": ["no", "yes"]}, "eval": None}},
        {"data": {"train": "a.jsonl", "eval": 0.1}},
        {"training": {"warmup": "3%", "micro_batch_size": 4, "packing": True}},
        {"training": {"warmup": 100, "micro_batch_size": "auto", "packing": "auto"}},
    ],
)
def test_it_accepts_the_short_forms(changes: dict[str, Any]) -> None:
    assert problems(changes) == []


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"methods": "lora"}, "recipe"),
        ({"method": "lorra"}, "method"),
        ({"method": {"name": "lora", "rnak": 8}}, "method"),
        ({"method": {"name": "lora", "rank": 0}}, "method"),
        ({"method": {"name": "adapter", "rank": 8}}, "method"),
        ({"data": {}}, "data"),
        ({"data": {"train": "a.jsonl", "format": "chatml"}}, "data.format"),
        ({"training": {"learning_rate": "high"}}, "training.learning_rate"),
        ({"training": {"batch_size": 0}}, "training.batch_size"),
        ({"training": {"warmup": "three"}}, "training.warmup"),
        ({"seed": -1}, "seed"),
        ({"output": ""}, "output"),
    ],
)
def test_it_refuses_a_bad_recipe_at_its_place(changes: dict[str, Any], place: str) -> None:
    assert problems(changes) == [place]


def test_it_refuses_a_recipe_without_its_required_keys() -> None:
    messages = [error.message for error in VALIDATOR.iter_errors({})]
    for key in ("model", "method", "data", "output"):
        assert f"'{key}' is a required property" in messages


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_key_has_a_description(model: type[BaseModel]) -> None:
    texts = descriptions(model)
    for key in model.model_fields:
        if key == "name" and model in METHODS.values():
            continue  # the name of a method describes itself
        assert texts.get(key, "").endswith("."), f"{model.__name__}.{key}"


def test_the_descriptions_reach_the_schema() -> None:
    parts = {"Recipe": SCHEMA, **SCHEMA["$defs"]}
    for model in MODELS:
        properties = parts[model.__name__]["properties"]
        assert set(properties) == set(model.model_fields)
        texts = descriptions(model)
        for key in model.model_fields:
            assert properties[key]["description"] == texts.get(key, "")


def test_the_tables_hold_every_key_with_its_default() -> None:
    text = reference()
    for model in MODELS:
        for key in model.model_fields:
            assert f"\n| `{key}` | " in text
    assert "| `rank` | whole number (>= 1, <= 4096) | `16` |" in text
    assert "| `batch_size` | whole number (>= 1, <= 100000) | `16` | The effective batch" in text
    assert "| `train` |" in text
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.replace("\\|", "").count("|") == 5, line
