"""YAML with YAML 1.2's scalars, places, and no way to blow up."""

from __future__ import annotations

import pytest

from peftcli.errors import RecipeError
from peftcli.recipe.document import dotted, read_document, read_scalar


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("5e-5", 5e-5),
        ("2E-4", 2e-4),
        ("1.", 1.0),
        ("-3", -3),
        ("1_000", 1000),
        ("true", True),
        ("yes", "yes"),
        ("off", "off"),
        ("12:30", "12:30"),
        ("2024-01-01", "2024-01-01"),
        ("5%", "5%"),
        ("null", None),
        ("'3'", "3"),
        ("[a, 1]", ["a", 1]),
        ("0x10", "0x10"),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    read = read_scalar(text)
    assert read == value
    assert type(read) is type(value)


def test_places_are_those_of_the_keys() -> None:
    document = read_document("a:\n  b: 1\n  c: [x, {d: 2}]\n", "f.yaml")
    assert document.place(("a", "b")) == "f.yaml:2:3"
    assert document.place(("a", "c", 1, "d")) == "f.yaml:3:11"
    assert document.place(("a", "unknown")) == "f.yaml:1:1"


def test_anchors_and_merges_work_and_written_keys_win() -> None:
    document = read_document("x: &x {a: 1, b: 2}\ny: {b: 3, <<: *x}\nz: *x\n", "f.yaml")
    assert document.values == {"x": {"a": 1, "b": 2}, "y": {"a": 1, "b": 3}, "z": {"a": 1, "b": 2}}


def test_a_key_written_twice_is_a_problem_with_both_places() -> None:
    document = read_document("a: 1\nb:\n  c: 1\n  c: 2\na: 3\n", "f.yaml")
    assert document.problems == [
        "f.yaml:4:3: b.c: written twice in the same section; the first is at f.yaml:3:3; keep one",
        "f.yaml:5:1: a: written twice in the same section; the first is at f.yaml:1:1; keep one",
    ]


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [*{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}]\n"
    for old, new in [("a", "b"), ("b", "c"), ("c", "d"), ("d", "e"), ("e", "f"), ("f", "g")]
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "f.yaml:1:1: the recipe is empty"),
        ("# only a comment\n", "f.yaml:1:1: the recipe is empty"),
        ("- a\n- b\n", "f.yaml:1:1: a recipe is a mapping of sections, found a list"),
        ("just words", "f.yaml:1:1: a recipe is a mapping of sections, found a str"),
        ("a: 1\n---\nb: 2\n", "f.yaml:2:1: a second document; a recipe is one document"),
        ("a: !!python/object/apply:os.system [id]\n", "f.yaml:1:4: YAML tag"),
        ("a: !env HOME\n", "f.yaml:1:4: YAML tag `!env` is not allowed; remove it"),
        ("a:\n\tb: 1\n", "f.yaml:2:1: not YAML"),
        ("a: [1, 2\n", "f.yaml:2:1: not YAML"),
        ("a: \x00\n", "f.yaml: not YAML: unacceptable character"),
        ("? [1]\n: 2\n", "f.yaml:1:3: a key must be a word"),
        ("a: &a [*a]\n", "nested deeper than 32 levels"),
        (BOMB, "more than 10,000 values after expanding aliases"),
        ("a: " + "[" * 3000 + "]" * 3000, "nested deeper than 32 levels"),
        ("x" * 1_000_001, "larger than 1,000,000 bytes"),
    ],
)
def test_refusals_name_the_place(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_document(text, "f.yaml")
    assert message in caught.value.message


def test_dotted() -> None:
    assert dotted(("data", "train", 1, "path")) == "data.train.1.path"
