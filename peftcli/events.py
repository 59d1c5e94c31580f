"""What a run tells while it goes on; `report.py` shows it, nothing else prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Note:
    """A sentence about a choice or a phase."""

    text: str


@dataclass(frozen=True)
class Warned:
    """A sentence about something unusual that does not stop the run."""

    text: str


@dataclass(frozen=True)
class Preparing:
    """How far the rows are read and tokenised; at most one in a second."""

    share: float
    rows: int


@dataclass(frozen=True)
class Step:
    """One optimizer step."""

    step: int
    total_steps: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float | None
    tokens_per_second: float
    memory_gib: float
    """Peak of allocated GPU memory; peak resident memory of the process without a GPU."""
    remaining_seconds: float


@dataclass(frozen=True)
class Evaluated:
    """One look at the held-out rows."""

    step: int
    loss: float
    perplexity: float
    best: bool


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint."""

    step: int
    path: Path


Event = Note | Warned | Preparing | Step | Evaluated | Saved
Listener = Callable[[Event], None]


def until_nobody_listens(tell: Listener) -> Listener:
    """The listener as long as it can write: a closed pipe or a full log must not end the run."""
    listening = True

    def told(event: Event) -> None:
        nonlocal listening
        if not listening:
            return
        try:
            tell(event)
        except OSError:
            listening = False

    return told
