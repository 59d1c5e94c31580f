"""A summand of the peak."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """Bytes with a name, and the formula that gave them."""

    name: str
    size: float
    formula: str
