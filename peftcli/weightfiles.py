"""Safetensors files, from their headers alone: what can be true, and what must be a lie."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from peftcli.errors import ArtefactError
from peftcli.untrusted import read_object

INDEX = "model.safetensors.index.json"
# Ten times the header of the largest published file; a hostile one takes 25 times its size.
MAX_HEADER_BYTES = 32 << 20
MAX_SIDES = 64  # what PyTorch can hold
BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    **dict.fromkeys(("BOOL", "U8", "I8"), 8),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
}
AGAIN = "download it again"


class _Twice(ValueError):
    pass


def check_folder(folder: Path) -> None:
    """Raise ArtefactError for an index that points elsewhere, or a header that cannot be true."""
    index = folder / INDEX
    names = indexed_files(index) if index.is_file() else []
    for file in sorted({folder / name for name in names} | set(folder.glob("*.safetensors"))):
        if file.is_file():
            with file.open("rb") as stream:
                read_header(stream, file)


def indexed_files(index: Path) -> list[str]:
    """The file names of an index, none of which leaves its folder."""
    mapping: Any = read_object(index, AGAIN).get("weight_map")
    names: list[str] = list(dict.fromkeys(mapping.values())) if _texts_only(mapping) else []
    if not names:
        raise ArtefactError(f"{index}: damaged: holds no weight_map of names", AGAIN)
    for name in names:
        if Path(name).name != name or name in ("", ".", "..") or "\0" in name:
            raise ArtefactError(
                f"{index}: damaged: points to {name[:80]!r}, outside its folder",
                "do not trust this model; download it again",
            )
    return names


def read_header(stream: BinaryIO, file: Path) -> tuple[int, dict[str, Any]]:
    """Offset of the tensor data and the header's entries, `__metadata__` left out.

    Every entry has a known dtype, a shape, and offsets that follow one another without a gap to
    the end of the file. Raises ArtefactError for anything else.
    """
    prefix = stream.read(8)
    length = int.from_bytes(prefix, "little")
    size = file.stat().st_size
    if prefix.startswith(b"version "):
        raise ArtefactError(
            f"{file}: a git-lfs pointer, not weights", "fetch the file: git lfs pull"
        )
    if len(prefix) < 8 or length > size - 8:
        raise ArtefactError(f"{file}: truncated or not a safetensors file", AGAIN)
    if length > MAX_HEADER_BYTES:
        raise ArtefactError(
            f"{file}: a header of {length:,} bytes, above {MAX_HEADER_BYTES:,}",
            "split the model into several files, or do not trust it",
        )
    header = _parsed(stream.read(length), file)
    end = _check_entries(header, size - 8 - length, file)
    if 8 + length + end != size:
        raise ArtefactError(f"{file}: truncated or padded", AGAIN)
    return 8 + length, header


def _parsed(text: bytes, file: Path) -> dict[str, Any]:
    try:
        header = json.loads(text, object_pairs_hook=_once)
    except _Twice as error:
        _corrupt(file, str(error))
    except (ValueError, RecursionError):
        _corrupt(file, "it is not JSON")
    if not isinstance(header, dict):
        _corrupt(file, "it is no JSON object")
    header.pop("__metadata__", None)
    return header


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        name = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise _Twice(f"the name {name[:80]!r} occurs twice")
    return values


def _check_entries(header: dict[str, Any], size: int, file: Path) -> int:
    """The end of the last tensor, when each begins where the one before it ends."""
    spans = []
    for name, entry in header.items():
        shown = repr(name[:80])
        if not isinstance(entry, dict):
            _corrupt(file, f"{shown} is no map")
        offsets: Any = entry.get("data_offsets")
        shape: Any = entry.get("shape")
        if not _whole(offsets) or len(offsets) != 2:
            _corrupt(file, f"{shown} has no two offsets")
        if not _whole(shape) or len(shape) > MAX_SIDES:
            _corrupt(file, f"{shown} has no shape")
        bits = BITS.get(entry["dtype"]) if isinstance(entry.get("dtype"), str) else None
        if bits is None:
            _corrupt(file, f"{shown} has an unknown dtype")
        if _values(shape, 8 * size) * bits != 8 * (offsets[1] - offsets[0]):
            _corrupt(file, f"{shown} has another size than its shape says")
        spans.append((offsets[0], offsets[1], shown))
    end = 0
    for first, last, shown in sorted(spans):
        if first != end:
            _corrupt(file, f"{shown} does not begin where the tensor before it ends")
        end = last
    return end


def _values(shape: Iterable[int], limit: int) -> int:
    """The product of the sides; some number above `limit` when it is above it."""
    empty = 0 in shape
    count, most = 1, 2**62 if empty else limit  # PyTorch multiplies the sides of empty ones too
    for side in shape:
        count *= side or 1
        if count > most:
            return limit + 1
    return 0 if empty else count


def _whole(value: object) -> bool:
    """Whether it is a list of whole numbers that are not negative."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _texts_only(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value.values())


def _corrupt(file: Path, reason: str) -> NoReturn:
    raise ArtefactError(f"{file}: its header is corrupt: {reason}", AGAIN)
