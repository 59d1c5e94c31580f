"""Imports go down only, and light files stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "peftcli"
# From the top down; a file may import from rows below its own, and from its own folder.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("train", "merge", "evaluate"),
    ("report", "estimate"),
    ("adapters",),
    ("dataset", "models", "run_dir", "fingerprint"),
    ("preparing", "basefiles"),
    ("recipe",),
    ("methods", "data", "rendering", "metrics"),
    ("architecture", "overlap"),
    ("events", "bundled", "weightfiles", "lock", "fp8", "records", "machine"),
    ("untrusted", "privacy", "paths"),
    ("errors", "words", "__init__"),
)
HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "numpy", "pyarrow", "matplotlib")


def row_of(module: str) -> int:
    return next(i for i, row in enumerate(LAYERS) if module in row)


def imports(file: Path) -> list[str]:
    """Every module a file imports from, apart from those needed for types only."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return [name for name in found if name and name.startswith("peftcli.")]


def test_every_import_goes_down() -> None:
    wrong = []
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        for name in imports(file):
            other = name.split(".")[1]
            if other != parts[0] and row_of(other) <= row_of(parts[0]):
                wrong.append(f"{'/'.join(parts)} imports {name}")
    assert wrong == []


def imported(*arguments: str) -> set[str]:
    """Which heavy libraries a command loads, in a process of its own."""
    code = (
        "import sys\nfrom peftcli.cli import app\n"
        f"sys.argv = {['peftcli', *arguments]!r}\n"
        "try:\n    app()\nexcept SystemExit:\n    pass\n"
        f"print('loaded', *[name for name in {HEAVY!r} if name in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(done.stdout.strip().splitlines()[-1].split()[1:])


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("--version",),
        ("train", "--help"),
        ("recipes", "ls"),
        ("schema",),
        ("train", "no-such-recipe.yaml"),
    ],
)
def test_light_commands_load_nothing_heavy(arguments: tuple[str, ...]) -> None:
    assert imported(*arguments) == set()


def test_a_wrong_recipe_is_refused_before_anything_heavy(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: bundled:tiny\nmethod: lorra\ndata: {train: x}\noutput: o\n")
    assert imported("train", str(recipe)) == set()
    recipe.write_text("model: bundled:tiny\nmethod: lora\ndata: {train: nope.jsonl}\noutput: o\n")
    assert imported("train", str(recipe)) == set()
