"""Checkpoints that are complete or not there.

A checkpoint is written into a staging folder, every file is hashed and synced, a manifest is
written last, and one rename puts it in place.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from safetensors import SafetensorError

from peftcli.errors import ArtefactError
from peftcli.run_dir import publish_folder, remove_folder, write_atomic
from peftcli.train import state
from peftcli.untrusted import read_object

MANIFEST = "MANIFEST.json"
STAGING = ".staging-checkpoint"
UNEVALUATED = "not-evaluated"  # marks a step whose evaluation a signal cut short
UNWANTED = ("training_args.bin", "README.md")  # a pickle with every argument, and a card


def publish(staging: Path, target: Path) -> None:
    """Turn a written staging folder into the checkpoint `target`."""
    for name in UNWANTED:
        (staging / name).unlink(missing_ok=True)
    files = {str(file.relative_to(staging)): _entry(file) for file in _files(staging)}
    write_atomic(staging / MANIFEST, json.dumps({"files": files}, indent=2))
    publish_folder(staging, target)


def newest(folder: Path, tell: Callable[[str], None], *, with_best: bool = False) -> Path | None:
    """The newest complete checkpoint; None where none was ever written.

    With `with_best` the best one so far, which the result may come from, must be complete too.
    Says through `tell` which ones it skipped and why; raises ArtefactError when all are damaged.
    """
    candidates = sorted(steps(folder), reverse=True)
    for step in candidates:
        path = folder / f"checkpoint-{step}"
        damage = verify(path) or state.damage(path)
        if damage is None and with_best:
            damage = _best_is_damaged(path)
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
    expected = _manifest(checkpoint)
    if expected is None:
        return "its manifest is missing or damaged"
    if checkpoint.is_symlink() or any(path.is_symlink() for path in checkpoint.rglob("*")):
        return "it holds a link"
    found = {str(file.relative_to(checkpoint)) for file in _files(checkpoint)}
    for name, entry in expected.items():
        if name not in found:
            return f"{name} is missing"
        if _entry(checkpoint / name) != entry:
            return f"{name} was changed or cut"
        if name.endswith((".pt", ".pth")) and _inflates(checkpoint / name):
            return f"{name} is not as PyTorch writes it: it is compressed"
    foreign = found - expected.keys()
    return f"{min(foreign)} does not belong to it" if foreign else None


@contextmanager
def loading(checkpoint: str | Path | None) -> Iterator[None]:
    """Turn what PyTorch refuses to load into an ArtefactError, without its advice to load it."""
    try:
        yield
    except (UnpicklingError, SafetensorError, EOFError, KeyError, ValueError, TypeError) as error:
        raise ArtefactError(
            f"{checkpoint}: holds what must not or cannot be loaded ({type(error).__name__})",
            "remove this checkpoint; --resume then goes on from the one before it",
        ) from None


def rotate(folder: Path, keep: int, best_step: int | None, newest_step: int | None = None) -> None:
    """Remove the oldest checkpoints beyond `keep`; the best and the newest always stay.

    Those after `newest_step` are damaged ones that the run was not resumed from.
    """
    present = sorted(steps(folder), reverse=True)
    for step in [step for step in present if newest_step and step > newest_step]:
        remove_folder(folder / f"checkpoint-{step}")
        present.remove(step)
    kept = dict.fromkeys(present[:1])
    if best_step in present:
        kept[best_step] = None
    for step in present:
        if len(kept) >= keep:
            break
        kept[step] = None
    for step in present:
        if step not in kept:
            remove_folder(folder / f"checkpoint-{step}")


def steps(folder: Path) -> list[int]:
    """The step of each checkpoint folder."""
    if not folder.is_dir():
        return []
    found = [re.fullmatch(r"checkpoint-([0-9]+)", path.name) for path in folder.iterdir()]
    return [int(match.group(1)) for match in found if match]


def _best_is_damaged(checkpoint: Path) -> str | None:
    best = state.read(checkpoint)["best_global_step"]
    if not best or f"checkpoint-{best}" == checkpoint.name:
        return None
    damage = verify(checkpoint.with_name(f"checkpoint-{best}"))
    return f"the best one before it, checkpoint-{best}, is damaged: {damage}" if damage else None


def _manifest(checkpoint: Path) -> dict[str, Any] | None:
    """What the manifest says of each file; None when it is missing or damaged."""
    try:
        files = read_object(checkpoint / MANIFEST).get("files")
    except ArtefactError:
        return None
    return files if isinstance(files, dict) else None


def _inflates(file: Path) -> bool:
    """Whether an archive would take more memory than its size: PyTorch never compresses."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (OSError, ValueError, zipfile.BadZipFile):
        return False
    return any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _entry(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}
