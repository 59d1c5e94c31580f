"""What a run wrote down, read again: run.json and metrics.jsonl may have been changed since."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftcli.errors import ArtefactError

KINDS: dict[type, tuple[str, ...]] = {
    dict: ("recipe", "base", "tokenizer", "data", "plan", "device", "versions"),
    list: ("shrunk", "resumed"),
    str: ("status",),
}
FIGURES = ("loss", "eval_loss", "grad_norm", "seconds")


def check_manifest(file: Path, values: Mapping[str, Any], hint: str) -> None:
    """Raise ArtefactError where a part of run.json is not of the kind that a run writes."""
    wrong = [name for kind, names in KINDS.items() for name in names if _is_not(values, name, kind)]
    if not wrong and not _names_files(values):
        wrong = ["data.files"]
    plan = values.get("plan")
    numbers = plan.items() if isinstance(plan, dict) else ()
    wrong += [f"plan.{name}" for name, value in numbers if isinstance(value, int) and value < 0]
    if not wrong and "shrunk" in values and not values["plan"].get("micro_batch_size"):
        wrong = ["plan.micro_batch_size"]
    if wrong:
        raise ArtefactError(f"{file}: damaged: {wrong[0]} is not what a run writes", hint)


def metrics_line(line: str) -> dict[str, Any] | None:
    """The figures of a whole line of metrics.jsonl; None for a torn or a foreign one."""
    try:
        values = json.loads(line) if line.endswith("\n") else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or type(values.get("step")) is not int:
        return None
    if not {"loss", "eval_loss"} & values.keys():
        return None
    known = all(isinstance(values.get(name), int | float | None) for name in FIGURES)
    return values if known else None


def _is_not(values: Mapping[str, Any], name: str, kind: type) -> bool:
    return name in values and not isinstance(values[name], kind)


def _names_files(values: Mapping[str, Any]) -> bool:
    files = values.get("data", {}).get("files", [])
    return isinstance(files, list) and all(
        isinstance(file, dict) and all(isinstance(file.get(key), str) for key in ("path", "sha256"))
        for file in files
    )
