"""JSON rows: one line at a time, or one element of a long list at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from peftcli.data.bytestream import lines, not_utf8
from peftcli.data.rows import DataFile, RawRow

MAX_DEPTH = 64
# An empty list takes three bytes in a file and more than sixty in memory.
MAX_PARTS = 1_000_000
LARGE = 1 << 20
PARTS = f"holds more than {MAX_PARTS:,} lists and maps"


class _DuplicateKey(ValueError):
    pass


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _DuplicateKey(f"the key {twice!r} occurs twice")
    return result


DECODER = json.JSONDecoder(object_pairs_hook=_pairs)


def parse_row(raw: bytes, parts: int = MAX_PARTS) -> tuple[dict[str, Any] | None, str]:
    """One line of JSON -> its object, or None and the problem."""
    if len(raw) > LARGE and raw.count(b"[") + raw.count(b"{") > parts:
        return None, PARTS
    try:
        text = raw.decode("utf-8")
        value = DECODER.decode(text)
    except UnicodeDecodeError as error:
        return None, not_utf8(error)
    except _DuplicateKey as error:
        return None, str(error)
    except json.JSONDecodeError as error:
        return None, f"broken JSON: {error.msg} at column {error.colno}"
    except ValueError:
        return None, "holds a number of thousands of digits"
    except RecursionError:
        return None, f"nested deeper than {MAX_DEPTH} levels"
    return check_value(value, text)


def check_value(value: object, text: str) -> tuple[dict[str, Any] | None, str]:
    """Refuse values that are no row: not an object, nested too deeply, or with broken text."""
    if not isinstance(value, dict):
        return None, f"the row is {type(value).__name__}, expected a JSON object {{...}}"
    if text.count("{") + text.count("[") > MAX_DEPTH and depth(value) > MAX_DEPTH:
        return None, f"nested deeper than {MAX_DEPTH} levels"
    if "\\u0000" in text:
        return None, "holds a NUL character (\\u0000)"
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            return (
                None,
                "holds half of a surrogate pair (\\ud800 to \\udfff), which is no character",
            )
    return value, ""


def depth(value: object) -> int:
    """Levels of nesting, without recursion."""
    level, current = 0, [value]
    while current:
        level += 1
        inner: list[object] = []
        for item in current:
            if isinstance(item, dict):
                inner.extend(item.values())
            elif isinstance(item, list):
                inner.extend(item)
        current = [item for item in inner if isinstance(item, dict | list)]
    return level


def json_lines(
    handle: BinaryIO, file: DataFile, first: int = 1, size: int | None = None
) -> Iterator[RawRow]:
    """The rows of JSON lines; blank lines are passed over."""
    for number, line in lines(handle, file, first, size):
        if line and not line.isspace():
            value, problem = parse_row(line)
            yield RawRow(file.shown, number, value, problem)
