"""Checkpoints that are complete or not there.

A checkpoint is written into a staging folder, every file is hashed and synced, a manifest is
written last, and one rename puts it in place.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peftcli.errors import ArtefactError
from peftcli.run_dir import publish_folder, write_atomic

MANIFEST = "MANIFEST.json"
STAGING = ".staging-checkpoint"
UNWANTED = ("training_args.bin", "README.md")  # a pickle with every argument, and a card


def publish(staging: Path, target: Path) -> None:
    """Turn a written staging folder into the checkpoint `target`."""
    for name in UNWANTED:
        (staging / name).unlink(missing_ok=True)
    files = {str(file.relative_to(staging)): _entry(file) for file in _files(staging)}
    write_atomic(staging / MANIFEST, json.dumps({"files": files}, indent=2))
    publish_folder(staging, target)


def newest(folder: Path, tell: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint; None where none was ever written.

    Says through `tell` which ones it skipped and why; raises ArtefactError when all are damaged.
    """
    candidates = sorted(steps(folder), reverse=True)
    for step in candidates:
        path = folder / f"checkpoint-{step}"
        damage = verify(path)
        if damage is None:
            return path
        tell(f"{path.name} is skipped: {damage}")
    if candidates:
        raise ArtefactError(
            f"{folder}: every checkpoint is damaged",
            "restore one from a copy, or start again with --overwrite",
        )
    return None


def verify(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None when every file is as it was written."""
    try:
        manifest: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        expected: dict[str, dict[str, Any]] = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return "its manifest is missing or damaged"
    for name, entry in expected.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.is_symlink():
            return f"{name} is a link"
        if _entry(file) != entry:
            return f"{name} was changed or cut"
    return None


def rotate(folder: Path, keep: int, best_step: int | None) -> None:
    """Remove the oldest checkpoints beyond `keep`; the best and the newest always stay."""
    present = sorted(steps(folder), reverse=True)
    kept = dict.fromkeys(present[:1])
    if best_step in present:
        kept[best_step] = None
    for step in present:
        if len(kept) >= keep:
            break
        kept[step] = None
    for step in present:
        if step not in kept:
            shutil.rmtree(folder / f"checkpoint-{step}")


def steps(folder: Path) -> list[int]:
    """The step of each checkpoint folder."""
    if not folder.is_dir():
        return []
    found = [re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.iterdir()]
    return [int(match.group(1)) for match in found if match]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _entry(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}
