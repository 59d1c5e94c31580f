"""Numbers in sentences."""

from __future__ import annotations


def counted(number: int, one: str, many: str | None = None) -> str:
    """The number and what it counts: `1 step`, `2,000 steps`, `1 row was`, `3 rows were`."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"
