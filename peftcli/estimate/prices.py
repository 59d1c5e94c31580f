"""Prices per GPU-hour: a table of text that anybody can edit, dated, with its source."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from peftcli.errors import UsageError

TABLE = Path(__file__).with_name("prices.csv")
COLUMNS = "gpu,low,high,read,source"


@dataclass(frozen=True, eq=False)
class Price:
    """US dollars for an hour of one GPU, cheapest to dearest; when it was read, and where."""

    low: float
    high: float
    read: str
    source: str


@cache
def prices() -> dict[str, Price]:
    """The table by the GPU's name; rows of the file that $PEFTCLI_PRICES names replace ours."""
    found = _rows(TABLE)
    own = os.environ.get("PEFTCLI_PRICES")
    return found | _rows(Path(own)) if own else found


def _rows(file: Path) -> dict[str, Price]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"PEFTCLI_PRICES: {file} cannot be read: {error}", "name a file of prices"
        ) from None
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line and line[0] != "#"]
    return dict(_row(f"{file}:{n}", line) for n, line in numbered if line != COLUMNS)


def _row(where: str, line: str) -> tuple[str, Price]:
    name, *rest = (part.strip() for part in line.split(","))
    try:
        low, high, read, source = float(rest[0]), float(rest[1]), rest[2], rest[3]
    except (IndexError, ValueError):
        low, high, read, source = math.nan, math.nan, "", ""
    if not 0 <= low <= high < 1000:
        raise UsageError(f"{where}: not a price", f"write five columns: {COLUMNS}")
    return name, Price(low, high, read, source)
