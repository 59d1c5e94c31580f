"""Have the disk read the base's first weights while the large libraries are imported."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from threading import Thread

from peftcli.errors import PeftcliError
from peftcli.merge.base import find_base
from peftcli.merge.source import AdapterSource

MOST_BYTES = 4 << 30  # more than a disk reads in that time
SHARE = 8  # of the machine's memory at most an eighth
PIECE = 1 << 24


def read_ahead(adapter: AdapterSource, base_model: str | None) -> Thread | None:
    """Start it and go on; nothing is downloaded, and nothing is said about what is missing.

    None where the base is not here yet.
    """
    try:
        base = find_base(adapter, base_model, offline=True, pickle=False)
    except (PeftcliError, OSError):  # the merge itself says what is wrong
        return None
    thread = Thread(target=_read, args=(base.folder,), daemon=True)
    thread.start()
    return thread


def _read(folder: Path) -> None:
    """In a thread, which imports nothing: modules are not imported twice at a time."""
    with suppress(OSError):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        left = min(MOST_BYTES, memory // SHARE)
        for file in sorted(folder.glob("*.safetensors")):
            left -= _expect(file, left)


def _expect(file: Path, most: int) -> int:
    """Ask for a file's first `most` bytes, or all; returns how many those are."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)  # a pipe must not hold it
    try:
        size = min(os.fstat(descriptor).st_size, max(0, most))
        for place in range(0, size, PIECE):
            length = min(PIECE, size - place)
            os.posix_fadvise(descriptor, place, length, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)
    return size
