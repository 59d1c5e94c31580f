"""Data sets on the hub, through `datasets`, which downloads each once into its own cache."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peftcli.data.rows import RawRow
from peftcli.errors import DataError


@dataclass(frozen=True)
class HubSet:
    """A split of a data set on the hub."""

    name: str
    subset: str | None
    split: str
    revision: str | None


def hub_rows(hub: HubSet) -> Iterator[RawRow]:
    """The rows of a hub set, numbered from 1; DataError when it cannot be loaded."""
    for number, row in enumerate(_load(hub), start=1):
        yield RawRow(f"{hub.name}/{hub.split}", number, dict(row))


def hub_state(hub: HubSet) -> tuple[int, str]:
    """The bytes of a hub set, and a hash that changes when the hub's data does."""
    rows = _load(hub)
    # The cache folders of `datasets` are named after the commit or the content of the data.
    files = sorted(str(file["filename"]) for file in rows.cache_files)
    text = "\n".join([*files, str(len(rows))])
    return int(rows.data.nbytes), hashlib.sha256(text.encode()).hexdigest()


def _load(hub: HubSet) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(hub.name, hub.subset, split=hub.split, revision=hub.revision)
    except (OSError, ValueError) as error:
        lines = str(error).strip().splitlines()
        raise DataError(
            f"{hub.name}: cannot be loaded from the hub: {lines[0][:300] if lines else error!r}",
            "for a local file, check the path; for the hub, check name, subset, split and network",
        ) from error
