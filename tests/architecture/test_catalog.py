"""The catalog's sizes give the published numbers of parameters and equal the real configs."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from peftcli.architecture.catalog import (
    Known,
    find_model,
    known_models,
    model_names,
    nearest_names,
)
from peftcli.architecture.config import Architecture, read_architecture

CONFIGS = Path(__file__).parents[2].parent / "shared" / "configs"
FOLDERS = {
    "llama-3-8b": None,  # no config of its own; the sizes of llama-3.1-8b
    "mistral-7b-v0.2": "mistral-7b-instruct-v0.2",
    "mistral-7b-v0.3": "mistral-7b-instruct-v0.3",
    "phi-3-mini": "phi-3-mini-128k",
}
# What the catalog leaves out: no recipe of ours depends on a window longer than the positions.
UNEQUAL = {"phi-3-mini": {"sliding_window"}}
WITHOUT_DTYPE = {"gpt2", "gpt2-medium", "gpt-j-6b", "gpt-oss-20b", "gpt-oss-120b"}


@pytest.mark.parametrize("known", known_models(), ids=lambda known: known.alias)
def test_parameters_are_the_published_ones(known: Known) -> None:
    architecture = find_model(known.alias)
    assert architecture is not None
    assert architecture.exact
    assert architecture.parameters() == known.parameters
    for hub_id in known.hub_ids:
        assert find_model(hub_id) == architecture


@pytest.mark.parametrize("alias", model_names())
def test_equals_the_real_configuration(alias: str) -> None:
    folder = FOLDERS.get(alias, alias)
    if folder is None or not (CONFIGS / folder).is_dir():
        pytest.skip("no real configuration of this model")
    real, ours = read_architecture(CONFIGS / folder), find_model(alias)
    different = {
        f.name for f in fields(Architecture) if getattr(real, f.name) != getattr(ours, f.name)
    }
    allowed = UNEQUAL.get(alias, set()) | ({"dtype"} if alias in WITHOUT_DTYPE else set())
    assert different <= allowed


def test_names_are_found_in_any_case_and_from_mirrors() -> None:
    eight = find_model("llama-3.1-8b")
    assert eight is not None
    assert find_model("META-LLAMA/LLAMA-3.1-8B-INSTRUCT") == eight
    assert find_model("unsloth/Llama-3.1-8B") == eight
    assert find_model("no-such-model") is None


def test_nearest_names() -> None:
    assert nearest_names("lama-3.1-8b")[0] == "llama-3.1-8b"
    assert "qwen3-8b" in nearest_names("Qwen/Qwen3-8")
    assert nearest_names("qwen3-8b-instruct")[0] == "qwen3-8b"
    assert nearest_names("someone/Llama-3.1-8B-4bit-mlx")[0] == "llama-3.1-8b"
    assert "mistral-7b-v0.1" in nearest_names("mistral")
    assert nearest_names("zzz") == []


def test_no_name_stands_for_two_models() -> None:
    owners: dict[str, set[str]] = {}
    for known in known_models():
        for name in (known.alias, *known.hub_ids):
            owners.setdefault(name.rsplit("/", 1)[-1].lower(), set()).add(known.alias)
    assert {name: found for name, found in owners.items() if len(found) > 1} == {}
