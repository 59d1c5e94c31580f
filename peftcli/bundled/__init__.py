"""Files that come with the program: `bundled:NAME` in a recipe."""

from __future__ import annotations

from pathlib import Path

PREFIX = "bundled:"
FOLDER = Path(__file__).parent


def bundled(name: str) -> Path | None:
    """The path of `bundled:NAME` (a model or a data file); None when the name is no bundled one.

    Raises FileNotFoundError when nothing of that name comes with the program.
    """
    if not name.startswith(PREFIX):
        return None
    wanted = name.removeprefix(PREFIX)
    for candidate in (FOLDER / wanted, FOLDER / "data" / f"{wanted}.jsonl"):
        if wanted in names() and candidate.exists():
            return candidate
    raise FileNotFoundError(f"{name}: not bundled; there are {', '.join(names())}")


def names() -> list[str]:
    """What can stand after `bundled:`."""
    models = [path.parent.name for path in FOLDER.glob("*/config.json")]
    data = [path.name.removesuffix(".jsonl") for path in (FOLDER / "data").glob("*.jsonl")]
    return sorted(models) + sorted(data)
