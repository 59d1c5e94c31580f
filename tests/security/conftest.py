"""A finished run and its parts, which each test copies and damages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hostile_files import peftcli, recipe


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty chat rows that no test changes."""
    file = tmp_path_factory.mktemp("chats") / "rows.jsonl"
    turns = [
        [{"role": "user", "content": f"twice w{i}"}, {"role": "assistant", "content": f"w{i} w{i}"}]
        for i in range(40)
    ]
    file.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    return file


@pytest.fixture(scope="session")
def finished(base_model: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a recipe and its finished run."""
    folder = tmp_path_factory.mktemp("finished")
    done = peftcli("train", recipe(folder, base_model, chats), "--quiet")
    assert done.code == 0, done.error
    return folder
