"""Data files as bytes: opened, unpacked, looked at before they are read, and cut into lines."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import BufferedReader, RawIOBase
from typing import BinaryIO, NoReturn, cast

from peftcli.data.rows import DataFile
from peftcli.errors import DataError, unreadable

MAX_LINE = 64 << 20
BOM = b"\xef\xbb\xbf"
HEAD = 4096
# Text packs ten times, the most repetitive fifty times; zeros and bombs a thousand times.
MAX_RATIO = 200
RATIO_FROM = 16 << 20
# First bytes of a file -> what it is and what to do.
MAGIC = {
    b"version https://git-lfs": ("a git-lfs pointer, not the data", "run `git lfs pull`"),
    b"\xff\xfe": ("UTF-16 text", "convert it: `iconv -f UTF-16 -t UTF-8 old > new`"),
    b"\xfe\xff": ("UTF-16 text", "convert it: `iconv -f UTF-16 -t UTF-8 old > new`"),
    b"PAR1": ("a Parquet file", "rename it to end in .parquet"),
    b"\x1f\x8b": ("gzipped", "rename it to end in .gz"),
    b"PK\x03\x04": ("a zip archive", "unpack it first"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "unpack it first"),
    b"<!DOCTYPE": ("a web page", "download the raw file instead"),
    b"<html": ("a web page", "download the raw file instead"),
}


@contextmanager
def open_data(file: DataFile) -> Iterator[BinaryIO]:
    """The unpacked bytes of `file` after any byte-order mark; DataError when it is no text."""
    try:
        with ExitStack() as stack:
            handle: BinaryIO = stack.enter_context(open(file.path, "rb"))
            if file.packed:
                unpacked = stack.enter_context(gzip.GzipFile(fileobj=handle))
                bounded = _Bounded(unpacked, handle, file)
                handle = cast(BinaryIO, BufferedReader(bounded, 1 << 16))
            head = handle.read(HEAD)
            check_head(head, file)
            handle.seek(len(BOM) if head.startswith(BOM) else 0)
            yield handle
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{file.shown}: broken gzip data: {error}", "copy the file again") from None
    except OSError as error:
        raise unreadable(file.shown, error, DataError) from None


class _Bounded(RawIOBase):
    """Unpacked bytes, refused when they become too many for what was read of the file."""

    def __init__(self, unpacked: gzip.GzipFile, packed: BinaryIO, file: DataFile) -> None:
        self.unpacked, self.packed, self.file = unpacked, packed, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.unpacked.seek(offset, whence)

    def tell(self) -> int:
        return self.unpacked.tell()

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        data = self.unpacked.read1(len(buffer))
        buffer[: len(data)] = data
        if self.unpacked.tell() > max(RATIO_FROM, MAX_RATIO * self.packed.tell()):
            raise DataError(
                f"{self.file.shown}: unpacks to more than {MAX_RATIO} times its size",
                "this is no text; unpack it yourself if you trust it",
            )
        return len(data)


def check_head(head: bytes, file: DataFile) -> None:
    """Refuse a file whose first bytes show that it is not the text its name promises."""
    if not head.strip(b"\xef\xbb\xbf \t\r\n"):
        raise DataError(f"{file.shown}: the file is empty", "check how it was written")
    check_magic(head, file)
    zeros = head.count(0)
    if zeros * 3 > len(head):
        raise DataError(
            f"{file.shown}:1: this is UTF-16 text without a mark, or no text",
            "convert it: `iconv -f UTF-16LE -t UTF-8 old > new`",
        )
    if zeros:
        raise DataError(f"{file.shown}:1: the file holds NUL bytes", "it is damaged or no text")


def check_magic(head: bytes, file: DataFile) -> None:
    """Refuse a file that starts like one of another kind."""
    for magic, (what, hint) in MAGIC.items():
        if head.startswith(magic) and not (magic == b"PAR1" and file.kind == "parquet"):
            raise DataError(f"{file.shown}:1: this is {what}", hint)


def lines(
    handle: BinaryIO, file: DataFile, first: int = 1, size: int | None = None
) -> Iterator[tuple[int, bytes]]:
    """Numbered lines with their ends, at most MAX_LINE bytes each, within `size` bytes."""
    number, left = first, size
    while left is None or left > 0:
        line = handle.readline(MAX_LINE + 1)
        if not line:
            return
        if len(line) > MAX_LINE:
            raise DataError(
                f"{file.shown}:{number}: the line is longer than {MAX_LINE >> 20} MiB",
                "one row stands on one line; check the line ends",
            )
        if left is not None:
            left -= len(line)
        yield number, line
        number += 1


def text_lines(handle: BinaryIO, file: DataFile) -> Iterator[str]:
    """Lines as text with their ends; DataError at the first that is not UTF-8."""
    for number, line in lines(handle, file):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            bad_encoding(file, number, error)


def bad_encoding(file: DataFile, line: int, error: UnicodeDecodeError) -> NoReturn:
    """Raise DataError for bytes that are not UTF-8."""
    raise DataError(f"{file.shown}:{line}: {not_utf8(error)}", CONVERT) from None


def not_utf8(error: UnicodeDecodeError) -> str:
    """What the bytes are and what they would be in the most frequent other encoding."""
    byte = error.object[error.start : error.start + 1]
    return f"not UTF-8 (byte {byte[0]:#04x}, which is {byte.decode('latin-1')!r} in latin-1)"


CONVERT = "convert the file: `iconv -f latin1 -t UTF-8 old > new` (or -f cp1252)"
