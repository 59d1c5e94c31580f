"""What preparing the data found, for people and for the run's manifest."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class FileReport:
    """A data file as it was read."""

    path: str
    split: str
    format: str
    why: str
    size: int
    sha256: str


@dataclass(frozen=True)
class SplitReport:
    """Rows and tokens of one split."""

    read: int
    bad: int
    too_long: int
    truncated: int
    answer_cut: int
    """Rows whose every answer lies beyond the length limit: left out."""
    untrained: int
    """Rows in which nothing is to be trained on: left out."""
    duplicates: int
    """Rows that occurred before; left out only with `duplicates: drop`."""
    overlap: int
    """Evaluation rows that are training rows too."""
    kept: int
    tokens: int
    trained_tokens: int
    length_p50: int
    length_p90: int
    length_p99: int
    length_max: int
    split: int = 0
    """Rows of plain text that were split; each piece is a kept row."""
    weighed: int = 0
    """Rows more by the weights of their sources; below zero: fewer."""
    limited: int = 0
    """Rows left out by `data.limit`."""
    bad_rows: tuple[str, ...] = ()
    """The first bad rows, as FILE:LINE: problem."""


@dataclass(frozen=True)
class DataReport:
    """What was read, what became of it, and what looks wrong."""

    train: SplitReport
    eval: SplitReport | None
    files: tuple[FileReport, ...]
    template: str
    """Where the chat template comes from."""
    end_of_turn: tuple[int, ...]
    """Token ids that end a generation, the one after an answer first."""
    largest_id: int
    """The largest token id; it must be a row of the embeddings."""
    warnings: tuple[str, ...] = field(default=())
    cached: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)
