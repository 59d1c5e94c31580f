"""A summand of the peak."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class Part:
    """Bytes with a name, and the formula that gave them."""

    name: str
    size: float
    formula: str
