"""What the data section names -> the files to read, in which form, and how rows are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from peftcli.data.check import form_of
from peftcli.data.formats import label_names
from peftcli.data.hub import HubSet, hub_rows, hub_state
from peftcli.data.readers import read_file
from peftcli.data.report import FileReport
from peftcli.data.rows import DataFile
from peftcli.data.scan import Range, scan
from peftcli.data.sources import Source, resolve
from peftcli.preparing.arrange import Choices
from peftcli.preparing.sources import sources_of
from peftcli.preparing.work import Form, Part
from peftcli.recipe.schema import Data


def plan_parts(data: Data, base_dir: Path) -> tuple[list[Part], list[FileReport]]:
    """Every file of every source, hashed, with the form of its rows."""
    parts: list[Part] = []
    reports: list[FileReport] = []
    for split, sources in sources_of(data).items():
        for number, source in enumerate(sources):
            places = resolve(source, base_dir)
            for place in [places] if isinstance(places, HubSet) else places:
                part, report = _part(split, number, source, place)
                parts.append(part)
                reports.append(report)
    return parts, reports


def choices_of(data: Data, seed: int) -> Choices:
    """How rows are split, dropped and weighed."""
    return Choices(
        share=data.eval if isinstance(data.eval, float | int) else None,
        duplicates=data.duplicates,
        overlap=data.overlap,
        limit=data.limit,
        weights={number: source.weight for number, source in enumerate(data.train)},
        seed=seed,
    )


def _part(
    split: str, number: int, source: Source, place: DataFile | HubSet
) -> tuple[Part, FileReport]:
    if isinstance(place, HubSet):
        shown, ranges = place.name, tuple[Range, ...]()
        seen = form_of(hub_rows(place), source, shown)
        size, sha256 = hub_state(place)
    else:
        shown = place.shown
        seen = form_of(read_file(place), source, shown)
        scanned = scan(place)
        size, sha256 = scanned.size, scanned.sha256
        ranges = scanned.ranges if place.kind == "jsonl" and not place.packed else ()
    form = Form(seen.name, dict(seen.columns), dict(label_names(source.labels)))
    report = FileReport(shown, split, seen.name, seen.why, size, sha256)
    return Part(split, number, place, form, size, ranges), report


def total_bytes(parts: Sequence[Part]) -> int:
    """Bytes to read."""
    return sum(part.size for part in parts)
