"""Every message of the corpus, word for word: a change shows in review.

`UPDATE_MESSAGES=1 pytest tests/messages` writes the files anew; read what changed.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hostile_files import peftcli
from messages.cases import CASES

EXPECTED = Path(__file__).parent / "expected"
UPDATE = bool(os.environ.get("UPDATE_MESSAGES"))


@pytest.mark.parametrize("name", CASES)
def test_message(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "dumb")
    for file, content in case.files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        encoded = content if isinstance(content, bytes) else content.encode()
        (tmp_path / file).write_bytes(encoded)
    answer = peftcli(*case.arguments)
    assert answer.code == case.code, answer.error
    assert answer.out == ""
    said = answer.error.replace(str(tmp_path), "FOLDER")
    assert "Traceback" not in said
    file = EXPECTED / f"{name}.txt"
    if UPDATE:
        file.write_text(said, encoding="utf-8")
    assert said == file.read_text(encoding="utf-8")


def test_no_message_without_a_case() -> None:
    assert {file.stem for file in EXPECTED.iterdir()} == set(CASES)
