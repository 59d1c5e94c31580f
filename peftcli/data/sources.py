"""What a recipe's data section names: files, folders, globs of them, or a set on the hub."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

from peftcli.bundled import bundled
from peftcli.data.hub import HubSet, hub_rows
from peftcli.data.readers import read_file
from peftcli.data.rows import DataFile, RawRow
from peftcli.errors import DataError
from peftcli.paths import expanded

SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "txt",
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HELD_OUT = re.compile(r"(valid|validation|val|dev|eval|test)\b|(valid|validation|dev|eval|test)_")


@dataclass(frozen=True)
class Source:
    """One place that rows come from; see the recipe's data section for each field."""

    path: str
    split: str = "train"
    subset: str | None = None
    revision: str | None = None
    weight: float = 1.0
    limit: int | None = None
    format: str = "auto"
    columns: Mapping[str, str] | None = None
    labels: Mapping[str, str] | Sequence[str] | None = None


def read_rows(source: Source, base_dir: Path) -> Iterator[RawRow]:
    """Every row of `source` in order, with its file and line, in bounded memory.

    Raises DataError for a path that does not exist and for a file that is no data file at all;
    a single bad row comes as a RawRow with a problem.
    """
    places = resolve(source, base_dir)
    if isinstance(places, HubSet):
        rows = hub_rows(places)
    else:
        rows = (row for file in places for row in read_file(file))
    return islice(rows, source.limit)


def resolve(source: Source, base_dir: Path) -> list[DataFile] | HubSet:
    """The files that `source` names, sorted, or the hub set when nothing local has that name."""
    try:
        own = bundled(source.path)
    except FileNotFoundError as error:
        raise DataError(f"data: {error}", "write one of those, or a file of yours") from None
    path = own or base_dir / expanded(source.path)
    if path.is_file():
        return [_data_file(path, source.path)]
    if path.is_dir():
        return _folder(path, source)
    if any(mark in source.path for mark in "*?["):
        found = sorted(glob.glob(str(path), recursive=True))
        files = [Path(name) for name in found if Path(name).is_file()]
        if not files:
            raise DataError(f"{source.path}: no file has such a name", f"searched in {base_dir}")
        return [_data_file(file, _shown(file, base_dir)) for file in files]
    if HUB_ID.fullmatch(source.path) and not set(Path(source.path).suffixes) & {*SUFFIXES, ".gz"}:
        return HubSet(source.path, source.subset, source.split, source.revision)
    raise DataError(f"{source.path}: no such file or folder", _near(path))


def check_exist(paths: Iterable[str], base_dir: Path) -> None:
    """Raise DataError naming every path that is neither here nor a name the hub could have."""
    found: dict[str, str] = {}
    for path in paths:
        try:
            resolve(Source(path), base_dir)
        except DataError as error:
            found[error.message] = error.hint
    if found:
        raise DataError("\n".join(found), "; ".join(dict.fromkeys(found.values())))


def _folder(folder: Path, source: Source) -> list[DataFile]:
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
        and _kind(path)
    ]
    if not files:
        raise DataError(
            f"{source.path}: the folder holds no data file",
            "data files end in " + ", ".join(SUFFIXES) + " (and .gz of them)",
        )
    chosen = [file for file in files if file.stem.startswith(source.split)]
    held_out = [file for file in files if HELD_OUT.match(file.stem)]
    if chosen and len(chosen) < len(files):
        files = chosen
    elif held_out and len(held_out) < len(files):
        names = ", ".join(file.name for file in held_out[:3])
        raise DataError(
            f"{source.path}: the folder holds several splits ({names} and others)",
            f"name the files, for instance `path: {source.path}/{files[0].name}`",
        )
    return [_data_file(file, f"{source.path.rstrip('/')}/{_shown(file, folder)}") for file in files]


def _kind(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return SUFFIXES.get(Path(name).suffix, "")


def _data_file(path: Path, shown: str) -> DataFile:
    kind, packed = _kind(path), path.name.lower().endswith(".gz")
    if not kind or (packed and kind == "parquet"):
        raise DataError(
            f"{shown}: files that end in {''.join(path.suffixes[-2:]) or 'nothing'} are not read",
            "accepted: " + ", ".join(SUFFIXES) + " and .gz of the text ones",
        )
    return DataFile(path, shown, kind, packed)


def _shown(path: Path, base: Path) -> str:
    return str(path.relative_to(base)) if path.is_relative_to(base) else str(path)


def _near(path: Path) -> str:
    """What lies where the path points to, most similar names first."""
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    names = [entry.name for entry in parent.iterdir() if not entry.name.startswith(".")]
    close = get_close_matches(path.name, names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)} (in {parent})?"
    return f"{parent} holds {', '.join(sorted(names)[:8]) or 'nothing'}; a hub id is owner/name"
