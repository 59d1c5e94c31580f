"""A file of rows, and a row as it stands in its file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class DataFile:
    """A file of rows: where it is, how messages name it, its kind, and whether it is gzipped."""

    path: Path
    shown: str
    kind: str
    packed: bool = False


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row; `line` counts from 1 (it is the row number for Parquet and the hub)."""

    file: str
    line: int
    value: dict[str, Any] | None
    problem: str = ""
    number: int = 0
    """Its place in the list, where many rows stand on one line."""

    @property
    def place(self) -> str:
        """FILE:LINE, as messages show it."""
        row = f" (row {self.number})" if self.number else ""
        return f"{self.file}:{self.line}{row}"
