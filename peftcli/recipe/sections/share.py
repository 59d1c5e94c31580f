"""A part of a whole, as a number or as `5%`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator


def as_share(value: Any) -> Any:
    """`5%` -> 0.05; anything else is left for the field's own type to judge."""
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return float(value.strip()[:-1]) / 100
        except ValueError:
            return value
    return value


Share = Annotated[float, BeforeValidator(as_share)]
