"""What was measured for each row, kept as it comes, so that an evaluation can go on later."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO


class Records:
    """One file of JSON lines for each model and way of measuring: row key -> result.

    The file's name is a hash of everything that decides its results, so results of another model,
    dtype or decoding are never mixed; a torn last line is left out.
    """

    def __init__(self, folder: Path, decides: Mapping[str, Any], *, fresh: bool = False) -> None:
        text = json.dumps(decides, sort_keys=True, default=str)
        name = hashlib.sha256(text.encode()).hexdigest()[:24]
        self.path = folder / f"{name}.jsonl"
        self.found: dict[str, Any] = {}
        self._stream: TextIO | None = None
        folder.mkdir(parents=True, exist_ok=True)
        if fresh:
            self.path.unlink(missing_ok=True)
        if self.path.is_file():
            self._read()

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The rows that are still to be measured."""
        return [key for key in keys if key not in self.found]

    def add(self, results: Mapping[str, Any]) -> None:
        """Keep results at once; a killed process loses the batch it was in, and no more."""
        if self._stream is None:
            self._stream = self.path.open("a", encoding="utf-8")
        for key, result in results.items():
            self._stream.write(json.dumps([key, result]) + "\n")
            self.found[key] = result
        self._stream.flush()

    def close(self) -> None:
        """Finish the file."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with self.path.open("r+b") as stream:
                stream.truncate(whole)
        for line in content[:whole].splitlines():
            try:
                key, result = json.loads(line)
            except (ValueError, TypeError, RecursionError):
                continue
            self.found[key] = result
