"""The recipe's data section as sources, and a check of their rows before any model is loaded."""

from __future__ import annotations

from pathlib import Path

from peftcli.data.check import CHECKED_ROWS, Checked, check_source
from peftcli.data.sources import Source
from peftcli.errors import DataError
from peftcli.recipe.schema import Data
from peftcli.recipe.schema import Source as RecipeSource


def check_data(data: Data, base_dir: Path, rows: int = CHECKED_ROWS) -> list[Checked]:
    """Read the first `rows` rows of each source; DataError lists what is wrong in all of them."""
    checked = [
        check_source(source, base_dir, rows)
        for sources in sources_of(data).values()
        for source in sources
    ]
    problems = [line for one in checked for line in one.problems]
    if problems and data.bad_rows == "error":
        total = sum(one.bad for one in checked)
        raise DataError(
            "\n".join([f"data: {total} of the first rows are bad:", *problems[:10]]),
            "mend them, or write `data.bad_rows: skip` to leave them out",
        )
    return checked


def sources_of(data: Data) -> dict[str, list[Source]]:
    """The sources of each split, with the data section's own form where they name none."""
    found = {"train": [_source(source, data) for source in data.train]}
    if isinstance(data.eval, tuple):
        found["eval"] = [_source(source, data) for source in data.eval]
    return found


def limits_of(data: Data) -> dict[tuple[str, int], int]:
    """The most rows of each source; no training source needs more than the limit of them all."""
    limits = {}
    for split, sources in sources_of(data).items():
        total = data.limit if split == "train" else None
        for number, source in enumerate(sources):
            known = [limit for limit in (source.limit, total) if limit is not None]
            if known:
                limits[split, number] = min(known)
    return limits


def _source(source: RecipeSource, data: Data) -> Source:
    return Source(
        path=source.path,
        split=source.split,
        subset=source.subset,
        revision=source.revision,
        weight=source.weight,
        limit=source.limit,
        format=source.format or data.format,
        columns=source.columns if source.columns is not None else data.columns,
        labels=source.labels if source.labels is not None else data.labels,
    )
