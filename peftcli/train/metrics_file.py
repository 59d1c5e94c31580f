"""metrics.jsonl: one JSON object for each step and evaluation, written as they come."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, TextIO

from peftcli.records import metrics_line
from peftcli.run_dir import write_atomic


class MetricsFile:
    """The file of one run; closed, it takes no lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream: TextIO | None = None

    def open(self, step: int) -> list[dict[str, Any]]:
        """Begin after `step`: the lines up to it are kept and returned, all others removed."""
        kept = _kept_lines(self.path, step)
        write_atomic(self.path, "".join(kept))
        self._stream = self.path.open("a", encoding="utf-8")
        return [json.loads(line) for line in kept]

    def write(self, line: dict[str, Any], *, sync: bool) -> None:
        """Add a line; `sync` before a checkpoint, which must not outlive the lines before it."""
        if self._stream is None:
            return
        finite = {key: _finite(value) for key, value in line.items()}
        self._stream.write(json.dumps(finite) + "\n")
        self._stream.flush()
        if sync:
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Take no more lines."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def _kept_lines(metrics: Path, step: int) -> list[str]:
    """The whole lines of metrics.jsonl up to `step`; a torn or later line is left out."""
    if not metrics.is_file():
        return []
    lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return [line for line in lines if (values := metrics_line(line)) and values["step"] <= step]


def _finite(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
