"""The identity of a base model: tensor names, shapes, dtypes and sampled bytes.

Reads safetensors headers and a few bytes of each tensor, so a 140 GB model takes seconds.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from peftcli.errors import ArtefactError
from peftcli.untrusted import read_json
from peftcli.weightfiles import INDEX, indexed_files, read_header

FILE_NAME = "base_fingerprint.json"
SAMPLE_BYTES = 64
SAMPLES = 4


@dataclass(frozen=True)
class Fingerprint:
    """What a base model is, whatever its folder is called."""

    digest: str
    """sha256 over every tensor's name, dtype, shape and sampled bytes, in hex."""
    tensors: int
    parameters: int
    bytes: int

    def to_json(self) -> str:
        """The content of `base_fingerprint.json` beside an adapter."""
        return json.dumps(asdict(self), indent=2) + "\n"


def fingerprint(folder: Path) -> Fingerprint:
    """Fingerprint the safetensors files of a model folder; raises ArtefactError."""
    if (folder / INDEX).is_file():
        indexed_files(folder / INDEX)
    files = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    if not files:
        raise ArtefactError(
            f"{folder}: no .safetensors file", "convert the weights to safetensors first"
        )
    records: list[tuple[str, str, list[int], bytes]] = []
    total = 0
    for file in files:
        with file.open("rb") as stream:
            start, header = read_header(stream, file)
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                total += end - begin
                sample = _sample(stream, start + begin, start + end)
                records.append((name, entry["dtype"], entry["shape"], sample))
    digest = hashlib.sha256()
    parameters = 0
    for name, dtype, shape, sample in sorted(records):
        digest.update(json.dumps([name, dtype, shape]).encode())
        digest.update(sample)
        count = 1
        for side in shape:
            count *= side
        parameters += count
    return Fingerprint(digest.hexdigest(), len(records), parameters, total)


def read_fingerprint(folder: Path) -> Fingerprint | None:
    """The fingerprint that `train` left in an adapter folder; None where there is none."""
    file = folder / FILE_NAME
    if not file.is_file():
        return None
    values = read_json(file)
    try:
        return Fingerprint(
            digest=str(values["digest"]),
            tensors=int(values["tensors"]),
            parameters=int(values["parameters"]),
            bytes=int(values["bytes"]),
        )
    except (ValueError, KeyError, TypeError, OverflowError):
        raise ArtefactError(
            f"{file}: not a fingerprint", "restore the file, or remove it to skip the check"
        ) from None


def check_same_base(adapter: Path, base: Path) -> None:
    """Raise ArtefactError when `adapter` was trained on other weights than those in `base`."""
    expected = read_fingerprint(adapter)
    if expected is None:
        return
    found = fingerprint(base)
    if found.digest != expected.digest:
        raise ArtefactError(
            f"{base} is not the base that {adapter} was trained on: "
            f"{_differences(expected, found)}",
            "name the original base model, at the revision that run.json records",
        )


def _sample(stream: BinaryIO, begin: int, end: int) -> bytes:
    taken = b""
    last = max(begin, end - SAMPLE_BYTES)
    for i in range(SAMPLES):
        stream.seek(begin + (last - begin) * i // (SAMPLES - 1))
        taken += stream.read(min(SAMPLE_BYTES, end - begin))
    return taken


def _differences(expected: Fingerprint, found: Fingerprint) -> str:
    if expected.parameters != found.parameters:
        return f"{expected.parameters:,} parameters then, {found.parameters:,} here"
    if expected.bytes != found.bytes:
        return f"{expected.bytes:,} bytes of weights then, {found.bytes:,} here (another dtype)"
    return "the same shapes, other values or names"
