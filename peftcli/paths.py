"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(path: str | Path) -> Path:
    """The path with `~` as the home folder; a user who is not here stays as written."""
    return Path(os.path.expanduser(path))
