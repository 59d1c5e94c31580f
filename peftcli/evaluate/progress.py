"""What an evaluation tells while it goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from peftcli.events import Note, Warned


@dataclass(frozen=True)
class Progressed:
    """Rows of one stage that are done."""

    what: str
    done: int
    total: int


Tell = Callable[[Note | Warned | Progressed], None]
