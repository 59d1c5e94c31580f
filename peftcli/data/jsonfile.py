"""JSON files: JSON lines, an object that holds one list, or a list that is read bit by bit."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from itertools import count
from typing import Any, BinaryIO

from peftcli.data.bytestream import MAX_LINE, bad_encoding
from peftcli.data.jsontext import (
    DECODER,
    LARGE,
    MAX_DEPTH,
    MAX_PARTS,
    PARTS,
    check_value,
    json_lines,
    parse_row,
)
from peftcli.data.rows import DataFile, RawRow
from peftcli.errors import DataError

MAX_OBJECT_FILE = 512 << 20
MAX_OBJECT_PARTS = 10 * MAX_PARTS
PIECE = 1 << 20
SPACE = " \t\r\n"
REST = "the rows after it cannot be found; mend the file, or write it as JSON lines"


def json_file(handle: BinaryIO, file: DataFile) -> Iterator[RawRow]:
    """A JSON file: a list of rows, an object that holds one list of rows, or JSON lines."""
    start = handle.tell()
    opening = handle.read(PIECE)
    handle.seek(start)
    if opening.lstrip()[:1] == b"[":
        return _list_rows(handle, file)
    if _first_line_is_whole(opening):
        return json_lines(handle, file)
    return _object_rows(handle, file)


def _first_line_is_whole(opening: bytes) -> bool:
    head, _, rest = opening.lstrip().partition(b"\n")
    value, _ = parse_row(head)
    if value is None:
        return False
    lone_list = [item for item in value.values() if isinstance(item, list)]
    return bool(rest.strip()) or not (lone_list and isinstance(lone_list[0][:1], list))


def _object_rows(handle: BinaryIO, file: DataFile) -> Iterator[RawRow]:
    data = handle.read(MAX_OBJECT_FILE + 1)
    if len(data) > MAX_OBJECT_FILE:
        raise DataError(
            f"{file.shown}: one JSON object of more than {MAX_OBJECT_FILE >> 20} MiB",
            "write the rows as JSON lines: `jq -c '.data[]' old.json > new.jsonl`",
        )
    value, problem = parse_row(data, MAX_OBJECT_PARTS)
    if value is None:
        raise DataError(f"{file.shown}: {problem}", "expected a list of rows, or JSON lines")
    found = {
        key: rows
        for key, rows in value.items()
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)
    }
    if len(found) != 1:
        raise DataError(
            f"{file.shown}: the object holds {len(found)} lists of rows ({', '.join(value)})",
            "expected one; write the rows as JSON lines",
        )
    rows = next(iter(found.values()))
    for number, row in enumerate(rows, start=1):
        yield RawRow(file.shown, number, row)


class _Text:
    """Text of a file, read piece by piece, with the line number of a position."""

    def __init__(self, handle: BinaryIO, file: DataFile) -> None:
        self.handle, self.file = handle, file
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.buffer, self.position, self.line, self.ended = "", 0, 1, False

    def more(self) -> bool:
        """Read on; as much again as is held, so that long rows are not parsed too often."""
        if self.ended or len(self.buffer) - self.position > MAX_LINE:
            return False
        data = self.handle.read(max(PIECE, len(self.buffer) - self.position))
        self.ended = not data
        try:
            text = self.decoder.decode(data, self.ended)
        except UnicodeDecodeError as error:
            bad_encoding(self.file, self.line, error)
        self.buffer, self.position = self.buffer[self.position :] + text, 0
        return True

    def skip_to(self, position: int) -> None:
        self.line += self.buffer.count("\n", self.position, position)
        self.position = position

    def peek(self) -> str:
        """The next character that is no white space, or "" at the end of the file."""
        while True:
            end = self.position
            while end < len(self.buffer) and self.buffer[end] in SPACE:
                end += 1
            self.skip_to(end)
            if end < len(self.buffer):
                return self.buffer[end]
            if not self.more():
                return ""

    def value(self) -> tuple[Any, str]:
        """The JSON value that starts here, and its text; DataError when it is broken."""
        while True:
            held = len(self.buffer) - self.position
            if held > 2 * LARGE and self._parts() > MAX_PARTS:
                raise DataError(f"{self.file.shown}:{self.line}: {PARTS}", REST)
            try:
                value, end = DECODER.raw_decode(self.buffer, self.position)
                if end < len(self.buffer) or not self.more():
                    text = self.buffer[self.position : end]
                    self.skip_to(end)
                    return value, text
            except (ValueError, RecursionError) as error:
                if not self.more():
                    self.fail(error)

    def _parts(self) -> int:
        return sum(self.buffer.count(mark, self.position) for mark in "[{")

    def fail(self, error: Exception) -> None:
        line, reason = self.line, str(error)
        if isinstance(error, json.JSONDecodeError):
            line += self.buffer.count("\n", self.position, error.pos)
            reason = f"broken JSON: {error.msg}"
        elif isinstance(error, RecursionError):
            reason = f"nested deeper than {MAX_DEPTH} levels"
        raise DataError(f"{self.file.shown}:{line}: {reason}", REST) from None


def _list_rows(handle: BinaryIO, file: DataFile) -> Iterator[RawRow]:
    text = _Text(handle, file)
    text.peek()
    text.skip_to(text.position + 1)
    if text.peek() == "]":
        raise DataError(f"{file.shown}: the list is empty", "check how it was written")
    before = 0
    for number in count(1):
        text.peek()
        line = text.line
        value, raw = text.value()
        row, problem = check_value(value, raw)
        yield RawRow(file.shown, line, row, problem, number if line == before else 0)
        before = text.line
        mark = text.peek()
        if mark == "]":
            return
        if mark != ",":
            where = "the file ends before the list does" if not mark else f"found {mark!r}"
            raise DataError(f"{file.shown}:{text.line}: expected , or ]: {where}", REST)
        text.skip_to(text.position + 1)
