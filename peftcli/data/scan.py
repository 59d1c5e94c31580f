"""One pass over a file's bytes: its hash, and where it can be cut between rows."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from peftcli.data.rows import DataFile
from peftcli.errors import DataError, unreadable

BLOCK = 1 << 19


@dataclass(frozen=True)
class Range:
    """Whole lines of a file: where they start, how many bytes they are, the first line's number."""

    start: int
    size: int
    line: int


@dataclass(frozen=True)
class Scan:
    """A file's size in bytes, its sha256, and ranges of lines that cover it."""

    size: int
    sha256: str
    ranges: tuple[Range, ...]


def scan(file: DataFile) -> Scan:
    """Hash `file`; files of lines are cut into ranges of about BLOCK bytes, others into one."""
    digest, ranges = hashlib.sha256(), list[Range]()
    offset = start = 0
    line = first = 1
    cut = file.kind == "jsonl" and not file.packed
    try:
        with open(file.path, "rb", buffering=0) as handle:
            while block := handle.read(BLOCK):
                digest.update(block)
                end = block.rfind(b"\n") + 1 if cut else 0
                if end:
                    ranges.append(Range(start, offset + end - start, first))
                    line += block.count(b"\n")
                    start, first = offset + end, line
                offset += len(block)
    except OSError as error:
        raise unreadable(file.shown, error, DataError) from None
    if start < offset:
        ranges.append(Range(start, offset - start, first))
    return Scan(offset, digest.hexdigest(), tuple(ranges))
