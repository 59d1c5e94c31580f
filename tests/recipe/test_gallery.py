"""The gallery: every recipe is valid, says what it is and needs, and can be listed and copied."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peftcli.architecture.catalog import find_model
from peftcli.data.sources import HUB_ID
from peftcli.errors import RecipeError, UsageError
from peftcli.recipe.checks import check_architecture
from peftcli.recipe.gallery import Entry, copy, entries, folder, read
from peftcli.recipe.load import load_recipe
from peftcli.recipe.reference import json_schema

ENTRIES = entries()
SCHEMA = "# yaml-language-server: $schema=https://raw.githubusercontent.com/peftcli/peftcli/main/recipes/schema.json"
SIZES = ("0.6b", "1b", "3b", "8b", "9b", "14b", "32b", "70b")
every_recipe = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)


def header(entry: Entry) -> list[str]:
    """The comment lines before the first key."""
    lines = entry.path.read_text("utf-8").splitlines()
    return lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]


def test_no_file_is_overlooked() -> None:
    files = {path for path in folder().rglob("*") if path.suffix in (".yaml", ".yml")}
    assert {entry.path for entry in ENTRIES} == files
    assert len(ENTRIES) > 50
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES)


def test_every_size_comes_in_every_form() -> None:
    names = {entry.name for entry in ENTRIES}
    for size in SIZES:
        methods = {name.split("/")[1] for name in names if name.split("/")[0].endswith(size)}
        assert "qlora" in methods, size
        assert methods & {"adapter", "adapter-nf4"}, size
        assert size == "70b" or "lora" in methods, size


@every_recipe
def test_is_valid_and_usual(entry: Entry) -> None:
    recipe = load_recipe(entry.path).recipe
    if not recipe.model.name.startswith("bundled:"):
        assert recipe.warnings() == []
        assert HUB_ID.fullmatch(recipe.model.name)
    assert recipe.output.startswith("runs/")


def test_no_two_recipes_share_a_run_folder() -> None:
    outputs = [load_recipe(entry.path).recipe.output for entry in ENTRIES]
    assert len(set(outputs)) == len(outputs)


@every_recipe
def test_the_model_can_be_tuned_so(entry: Entry) -> None:
    loaded = load_recipe(entry.path)
    architecture = find_model(loaded.recipe.model.name)
    if architecture is None:
        pytest.skip("the catalog does not hold this model")
    check_architecture(loaded, architecture)
    assert loaded.recipe.method.trainable_parameters(architecture) > 0


def test_the_check_against_the_architecture_can_fail() -> None:
    loaded = load_recipe(folder() / "qwen3-0.6b" / "lora.yaml", ["method.rank=2048"])
    architecture = find_model(loaded.recipe.model.name)
    assert architecture is not None
    with pytest.raises(RecipeError, match=r"method\.rank: 2048 is above 1024"):
        check_architecture(loaded, architecture)


@every_recipe
def test_the_header_says_what_needs_and_how(entry: Entry) -> None:
    lines = header(entry)
    assert lines[0] == SCHEMA
    assert entry.summary == lines[1].removeprefix("# ")
    assert entry.summary.endswith(".")
    needs = [line for line in lines if line.startswith("# Needs: ")]
    assert len(needs) == 1
    assert "GPU" in needs[0]
    assert any(line.startswith("# Run:   peftcli train ") for line in lines)
    assert max(map(len, lines[1:])) <= 100
    assert all(line.startswith("# ") for line in lines)


@every_recipe
def test_the_commands_of_the_header_work(entry: Entry, tmp_path: Path) -> None:
    commands = [line.split(":", 1)[1].split() for line in header(entry) if "  peftcli " in line]
    for words in commands:
        if words[:3] == ["peftcli", "recipes", "copy"]:
            copy(words[3], tmp_path / "recipe.yaml")
    run = next(words for words in commands if words[:2] == ["peftcli", "train"])
    place = tmp_path if run[2] == "recipe.yaml" else folder().parent
    assert load_recipe(place / run[2]).recipe == load_recipe(entry.path).recipe


@every_recipe
def test_is_short_and_plain_text(entry: Entry) -> None:
    text = entry.path.read_text("utf-8")
    assert text.isascii()
    assert text.endswith("\n")
    assert "\t" not in text
    assert len(text.splitlines()) < 40


def test_the_committed_schema_is_fresh() -> None:
    stored = (folder() / "schema.json").read_text("utf-8")
    assert json.loads(stored) == json.loads(json_schema()), "run scripts/update_readme"


def test_a_recipe_is_read_by_its_name() -> None:
    text = (folder() / "qwen3-8b" / "qlora.yaml").read_text("utf-8")
    assert read("qwen3-8b/qlora") == text
    assert read("qwen3-8b/qlora.yaml") == text


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("qwen3-8b/qlra", "qwen3-8b/qlora"), ("lama-3.1-8b/lora", "llama-3.1-8b/lora")],
)
def test_a_wrong_name_brings_the_nearest_ones(wrong: str, near: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(wrong)
    assert wrong in caught.value.message
    assert near in caught.value.hint
    assert "peftcli recipes ls" in caught.value.hint


def test_a_name_cannot_lead_out_of_the_gallery() -> None:
    with pytest.raises(UsageError):
        read("../README.md")


def test_copy_writes_a_file_or_into_a_folder(tmp_path: Path) -> None:
    file = copy("qwen3-8b/qlora", tmp_path / "mine.yaml")
    assert file.read_text("utf-8") == read("qwen3-8b/qlora")
    assert copy("qwen3-8b/qlora", tmp_path) == tmp_path / "qwen3-8b-qlora.yaml"
    assert load_recipe(tmp_path / "qwen3-8b-qlora.yaml").recipe.method.name == "qlora"


def test_copy_never_replaces_a_file(tmp_path: Path) -> None:
    mine = tmp_path / "recipe.yaml"
    mine.write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match="exists already"):
        copy("qwen3-8b/qlora", mine)
    assert mine.read_text("utf-8") == "mine"
    with pytest.raises(UsageError, match="cannot be written"):
        copy("qwen3-8b/qlora", tmp_path / "absent" / "recipe.yaml")
