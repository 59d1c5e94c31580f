"""What is fuzzed: one function for each kind of file, which may raise a PeftcliError and no more.

Each takes bytes. `check_target` also holds that nothing is written and that it ends in time.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from peftcli.data.check import check_source
from peftcli.data.sources import Source
from peftcli.errors import ExitCode, PeftcliError
from peftcli.fingerprint import fingerprint
from peftcli.merge.checkpoint import read_safetensors
from peftcli.merge.refuse import check_config
from peftcli.merge.source import find_adapter
from peftcli.recipe.load import load_recipe, recipe_text
from peftcli.untrusted import check_adapter_config, check_patterns

SECONDS = 10.0
MODULES = [f"model.layers.{i}.self_attn.q_proj" for i in range(4)]
SUFFIXES = ("jsonl", "json", "csv", "tsv", "txt", "jsonl.gz")


def recipes(content: bytes, folder: Path) -> None:
    """A recipe: read, checked, and written out again the same."""
    file = folder / "recipe.yaml"
    file.write_bytes(content)
    loaded = load_recipe(file)
    file.write_text(recipe_text(loaded.recipe), encoding="utf-8")
    again = load_recipe(file)
    assert recipe_text(again.recipe) == recipe_text(loaded.recipe)


def rows(content: bytes, folder: Path) -> None:
    """A data file of every kind."""
    kind = SUFFIXES[content[0] % len(SUFFIXES)] if content else "jsonl"
    file = folder / f"rows.{kind}"
    file.write_bytes(content[1:])
    check_source(Source(file.name), folder)


def headers(content: bytes, folder: Path) -> None:
    """A safetensors file; every tensor that its header has can be read."""
    file = folder / "model.safetensors"
    file.write_bytes(content)
    stored = read_safetensors(file)
    for entry in stored.values():
        assert entry.read().shape == entry.shape
    fingerprint(folder)


def adapters(content: bytes, folder: Path) -> None:
    """An adapter_config.json, as merge and eval read it before anything else."""
    (folder / "adapter_config.json").write_bytes(content)
    source = find_adapter(folder)
    check_adapter_config("a", source.config)
    check_patterns("a", source.config, MODULES)
    check_config("a", source.config)


TARGETS: dict[str, Callable[[bytes, Path], None]] = {
    "recipes": recipes,
    "rows": rows,
    "headers": headers,
    "adapters": adapters,
}


def check_target(name: str, content: bytes, folder: Path) -> str:
    """Run one case in its folder; returns what came of it. Anything but a PeftcliError is a bug."""
    beside = set(os.listdir(folder.parent))
    started = time.process_time()
    try:
        TARGETS[name](content, folder)
        came = "accepted"
    except PeftcliError as error:
        came = type(error).__name__
        code, message = error.exit_code, error.message
    else:
        code, message = ExitCode.DONE, "accepted"
    assert code in (0, 2, 4, 5), message
    assert 0 < len(message.strip()) < 20_000, "a message that nobody reads"
    assert time.process_time() - started < SECONDS, "too slow"
    assert set(os.listdir(folder.parent)) == beside, "it wrote outside of its folder"
    for file in folder.iterdir():
        file.unlink()
    return came
