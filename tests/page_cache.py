"""What of a file is in memory, asked of the system itself."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path


def share_in_memory(file: Path) -> float:
    """The share of a file's pages that the page cache holds."""
    libc = ctypes.CDLL(None, use_errno=True)
    with file.open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as mapped:
        pages = -(-len(mapped) // mmap.PAGESIZE)
        found = (ctypes.c_ubyte * pages)()
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(len(mapped)), found) == 0
    return sum(one & 1 for one in found) / pages


def forget(file: Path) -> None:
    """Take a file out of the page cache."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
