"""Recipes of strangers: no tags, no bombs, nothing written elsewhere."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hostile_files import copied, fresh_and_measured, peftcli, recipe, refused

from peftcli.errors import RecipeError
from peftcli.recipe.document import read_document

TAIL = "method: lora\ndata: {train: x.jsonl}\noutput: run\n"
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {k0: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [*{old}, *{old}, *{old}, *{old}, *{old}, *{old}], k{i}: 1}}\n"
    for i, (old, new) in enumerate(zip("abcdefgh", "bcdefghi", strict=True), 1)
)
HOSTILE = {
    "a Python object": ("model: !!python/object/apply:os.system ['touch ran']\n", "1:8"),
    "a Python name": ("model: !!python/name:os.system\n", "not allowed"),
    "a tag of its own": ("model: !env HF_TOKEN\n", "not allowed"),
    "a standard tag": ("model: !!binary aGk=\n", "not allowed"),
    "a tag directive": (
        "%TAG ! tag:yaml.org,2002:python/\n---\nmodel: !name:os.system\n",
        "allowed",
    ),
    "a billion laughs": (LAUGHS, "aliases"),
    "a billion merges": (MERGES, "aliases"),
    "an alias to itself": ("model: &a [*a]\n", "nested deeper"),
    "an alias to nothing": ("model: *a\n", "undefined alias"),
    "deep lists": ("model: " + "[" * 5000 + "\n", "nested deeper"),
    "deep maps": ("model: " + "{a: " * 5000 + "\n", "nested deeper"),
    "deep blocks": ("\n".join(" " * i + "a:" for i in range(900)), "nested deeper"),
    "a hundred thousand keys": ("".join(f"k{i}: 1\n" for i in range(100_000)), "more than"),
    "two documents": ("model: a\n---\nmodel: b\n", "second document"),
    "a megabyte of text": ("model: " + "x" * 1_100_000, "larger than"),
    "a NUL": ("model: a\0b\n", "not YAML"),
    "a control character": ("model: a\x1bb\n", "not YAML"),
    "a long number": ("seed: " + "9" * 5000 + "\n", "seed"),
    "a key that is a list": ("? [a, b]\n: c\n", "a key must be a word"),
    "nothing": ("", "empty"),
    "a list": ("- model\n", "mapping"),
    "a tab": ("model:\n\tname: a\n", "tabs"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_recipes_are_refused_at_once(name: str, tmp_path: Path) -> None:
    text, words = HOSTILE[name]
    (tmp_path / "r.yaml").write_text(text)
    started = time.process_time()
    refused(peftcli("train", tmp_path / "r.yaml"), 2, words)
    assert time.process_time() - started < 10
    assert not Path("ran").exists()


def test_a_recipe_that_is_not_text_or_never_ends(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\0\0")
    refused(peftcli("train", tmp_path / "r.yaml"), 2, "not UTF-8")
    answer = fresh_and_measured("train", "/dev/zero")
    refused(answer, 2)
    assert int(answer.error.split()[-1]) < 200


def test_variables_of_the_environment_are_not_expanded(
    base_model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CANARY", "expanded-value")
    monkeypatch.chdir(tmp_path)
    file = recipe(tmp_path, base_model, chats)
    for text in ("$CANARY/run", "${CANARY}", "{{ env.CANARY }}", "%CANARY%"):
        answer = peftcli("train", file, "--dry-run", "--set", f"output={text!r}")
        assert answer.code == 0, answer.error
        assert "expanded-value" not in answer.out + answer.error
    assert not list(tmp_path.glob("expanded-value*"))


@pytest.mark.parametrize("name", ["metrics.jsonl", ".lock", "checkpoints", "adapter", "run.json"])
@pytest.mark.parametrize("option", ["--resume", "--overwrite"])
def test_links_out_of_a_run_folder_are_not_followed(
    finished: Path, base_model: Path, chats: Path, tmp_path: Path, name: str, option: str
) -> None:
    copied(finished / "run", tmp_path / "run")
    outside = tmp_path / "outside"
    inside = tmp_path / "run" / name
    if inside.is_dir():
        inside.rename(outside)
    else:
        outside.write_text(inside.read_text() if inside.is_file() else "precious\n")
        inside.unlink(missing_ok=True)
    inside.symlink_to(outside)
    before = outside.read_text() if outside.is_file() else sorted(outside.rglob("*"))
    answer = peftcli("train", recipe(tmp_path, base_model, chats), option)
    refused(answer, 2, "is a link to", "outside the run folder")
    after = outside.read_text() if outside.is_file() else sorted(outside.rglob("*"))
    assert before == after


@pytest.mark.parametrize("name", ["../x", "a/b", "", "default\\n", "lora_A", "." * 300])
def test_adapters_have_no_names_to_choose(
    base_model: Path, chats: Path, tmp_path: Path, name: str
) -> None:
    file = recipe(tmp_path, base_model, chats)
    for key in ("method.adapter_name", "adapter_name", "method.name"):
        answer = peftcli("train", file, "--set", f'{key}="{name}"')
        assert answer.code == 2, answer.error
    assert os.listdir(tmp_path) == ["r.yaml"]


def test_places_survive_many_aliases() -> None:
    with pytest.raises(RecipeError, match="aliases"):
        read_document(LAUGHS + TAIL, "r.yaml")
