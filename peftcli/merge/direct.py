"""Weights between disk and memory past the page cache, through memory that is used again.

Copying through the cache takes more of a processor than the arithmetic of a merge, and pushes out
what other programs hold there. What the cache has already is read from it, and file systems that
know no direct access go through it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch

from peftcli.errors import ArtefactError

PAGE = mmap.PAGESIZE  # direct access begins and ends there, in the file as in memory
PIECE_BYTES = 1 << 23  # of the base are read at once, and written
REFUSED = (errno.EINVAL, errno.EOPNOTSUPP)  # by file systems without direct access
_libc = ctypes.CDLL(None)


class Memory:
    """Page-aligned memory that grows to the largest piece it was asked to hold."""

    def __init__(self, size: int = 0) -> None:
        self.bytes = torch.empty(0, dtype=torch.uint8)
        self.view = memoryview(b"")
        self.fit(size)

    def fit(self, size: int) -> None:
        """Have room for so many bytes; what was in it is lost when it grows."""
        if size > len(self.view):
            mapped = mmap.mmap(-1, _up(size))
            self.bytes = torch.frombuffer(mapped, dtype=torch.uint8)
            self.view = memoryview(mapped)

    def shrink(self) -> None:
        """Give back what only rows of an unusual size needed."""
        if len(self.view) > 2 * PIECE_BYTES:
            self.bytes, self.view = torch.empty(0, dtype=torch.uint8), memoryview(b"")


def read_piece(file: Path, begin: int, size: int, memory: Memory) -> torch.Tensor:
    """Bytes of a file; they are in `memory`, so that the next piece takes their place.

    Raises ArtefactError where the file ends before.
    """
    first, last = _down(begin), _up(begin + size)
    memory.fit(last - first)
    descriptor = os.open(file, os.O_RDONLY)
    try:
        direct = not _cached(descriptor, first, begin + size) and _set_direct(descriptor)
        done = 0
        while done < begin - first + size:
            room = memory.view[done : last - first]
            try:
                read = os.preadv(descriptor, [room], first + done)
            except OSError as error:
                if not direct or error.errno not in REFUSED:
                    raise
                direct = False
                fcntl.fcntl(descriptor, fcntl.F_SETFL, 0)
                continue
            if not read:
                raise ArtefactError(f"{file}: became shorter", "download it again")
            done += read
    finally:
        os.close(descriptor)
    return memory.bytes[begin - first : begin - first + size]


def read_pieces(file: Path, begin: int, size: int, memory: Memory) -> Iterator[torch.Tensor]:
    """The same bytes a piece at a time, each in the place of the one before."""
    for start in range(0, size, PIECE_BYTES):
        yield read_piece(file, begin + start, min(PIECE_BYTES, size - start), memory)


class Output:
    """A file that is written by several threads, each in places of its own."""

    def __init__(self, file: Path, size: int) -> None:
        """Create it and take its space on the disk."""
        with ExitStack() as undo:
            self.descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            undo.callback(os.close, self.descriptor)
            os.posix_fallocate(self.descriptor, 0, size)
            self._other = os.open(file, os.O_WRONLY)
            undo.callback(os.close, self._other)
            self.direct = _set_direct(self._other)
            """Whether whole pages go to the disk at once."""
            self._close = undo.pop_all().close

    def write(self, data: memoryview, offset: int) -> None:
        """Write at a place; whole pages directly, which must lie on pages in memory too."""
        first = min(len(data), -offset % PAGE)
        last = max(first, len(data) - (offset + len(data)) % PAGE)
        self.write_buffered(data[:first], offset)
        self._write_direct(data[first:last], offset + first)
        self.write_buffered(data[last:], offset + last)

    def close(self) -> None:
        """Without bringing it to the disk."""
        self._close()

    def _write_direct(self, data: memoryview, offset: int) -> None:
        done = 0
        try:
            while self.direct and done < len(data) and done % PAGE == 0:
                done += os.pwrite(self._other, data[done:], offset + done)
        except OSError as error:
            if error.errno not in REFUSED:
                raise
            self.direct = False
        self.write_buffered(data[done:], offset + done)

    def write_buffered(self, data: memoryview, offset: int) -> None:
        """Write at a place through the page cache."""
        done = 0
        while done < len(data):
            done += os.pwrite(self.descriptor, data[done:], offset + done)


class Writer:
    """Collects a tensor's bytes in memory and writes them in large pieces."""

    def __init__(self, output: Output, offset: int, memory: Memory) -> None:
        self._output, self._memory = output, memory
        self._start = _down(offset)  # of the memory's first byte in the file
        self._head = self._filled = offset - self._start

    def add(self, values: torch.Tensor) -> None:
        """The next values."""
        data = values.contiguous().view(-1).view(torch.uint8)
        while data.numel():
            size = min(data.numel(), len(self._memory.view) - self._filled)
            self._memory.bytes[self._filled : self._filled + size].copy_(data[:size])
            self._filled += size
            data = data[size:]
            if self._filled == len(self._memory.view):
                self.flush()

    def flush(self) -> None:
        """Write what was collected."""
        data = self._memory.view[self._head : self._filled]
        self._output.write(data, self._start + self._head)
        self._start, self._head = self._start + self._filled, 0
        self._filled = 0


def _set_direct(descriptor: int) -> bool:
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_DIRECT)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        return False
    return True


def _cached(descriptor: int, first: int, end: int) -> bool:
    """Whether the page cache holds most of these bytes; asking does not read them.

    Of a file that we neither own nor may write the kernel does not tell, and it counts as held.
    """
    size = min(end, os.fstat(descriptor).st_size) - first
    if size <= 0:
        return True
    try:
        mapped = mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE, offset=first)
    except (OSError, ValueError):  # nothing can be mapped there, or the file became shorter
        return False
    with mapped:
        found = bytearray(-(-size // PAGE))
        start = ctypes.c_char.from_buffer(mapped)
        into = (ctypes.c_char * len(found)).from_buffer(found)
        failed = _libc.mincore(ctypes.byref(start), ctypes.c_size_t(size), into)
        del start  # or the mapping could not be closed
    return not failed and sum(page & 1 for page in found) > len(found) // 2


def _down(place: int) -> int:
    return place // PAGE * PAGE


def _up(place: int) -> int:
    return -(-place // PAGE) * PAGE
