"""Rows of a task that a tiny model learns in seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

THINGS = ("apple", "grass", "sky", "stone")
COLOURS = ("red", "green", "blue", "grey")
Train = Callable[..., Path]


def colour_rows(count: int = 160, start: int = 0) -> list[dict[str, object]]:
    """`7 apple`, 0 (which is red): few labels, and short answers at once."""
    return [
        {"text": f"{number} {THINGS[number % 4]}", "label": number % 4}
        for number in range(start, start + count)
    ]


def write_rows(file: Path, rows: list[dict[str, object]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file
