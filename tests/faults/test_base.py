"""A base whose files do not belong together is found before the first step."""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path

import pytest
from faults.lab import Lab
from faults.scene import Scene


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A copy of the bundled base."""
    folder = tmp_path / "base"
    shutil.copytree(str(files("peftcli.bundled") / "tiny"), folder)
    return folder


@pytest.mark.parametrize("more", [-8, 64])
def test_a_config_of_another_vocabulary(lab: Lab, scene: Scene, base: Path, more: int) -> None:
    config = json.loads((base / "config.json").read_text())
    rows = config["vocab_size"]
    config["vocab_size"] = rows + more
    (base / "config.json").write_text(json.dumps(config))
    output = scene.output()
    refused = lab.run("train", scene.recipe(output, model=str(base)), "--json", cwd=scene.folder)
    assert refused.code == 4, refused.errors
    assert str(rows) in refused.errors
    assert str(rows + more) in refused.errors
    assert "Traceback" not in refused.errors
    assert '"event": "step"' not in refused.output


def test_more_tokens_than_rows(lab: Lab, scene: Scene, base: Path) -> None:
    """Rows that use a token for which the model has no row in its embedding."""
    rows = json.loads((base / "config.json").read_text())["vocab_size"]
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    extra = {
        "id": rows + 5,
        "content": "Order",
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": False,
    }
    tokenizer["added_tokens"].append(extra)
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    data = scene.folder / "order.jsonl"
    line = {
        "messages": [
            {"role": "user", "content": "Order please"},
            {"role": "assistant", "content": "Order Order"},
        ]
    }
    data.write_text("".join(json.dumps(line) + "\n" for _ in range(8)))
    output = scene.output()
    recipe = scene.recipe(output, model=str(base), data={"train": str(data), "eval": None})
    refused = lab.run("train", recipe, "--json", cwd=scene.folder)
    assert refused.code == 4, refused.errors
    assert "Traceback" not in refused.errors
    assert '"event": "step"' not in refused.output
