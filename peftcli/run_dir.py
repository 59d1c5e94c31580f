"""The layout of a run folder, and writing without half-written files."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peftcli.lock import hold
from peftcli.records import check_manifest
from peftcli.untrusted import read_object

Status = Literal["running", "interrupted", "failed", "finished"]
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
OWN_NAMES = (
    *("recipe.yaml", "run.json", "metrics.jsonl", "loss.png", "adapter", "model", "checkpoints"),
    *(".lock", "merged", "eval.json", "report.html", "tracking"),
)


@dataclass(frozen=True)
class RunDir:
    """Where each file of a run lies."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def manifest(self) -> Path:
        """What was run: identities, versions, plan, results."""
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        """One JSON object for each step and evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def loss_plot(self) -> Path:
        """The loss curve as a picture."""
        return self.path / "loss.png"

    @property
    def adapter(self) -> Path:
        """The result of an adapter method, in PEFT's format."""
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The result of full fine-tuning, in transformers' format."""
        return self.path / "model"

    @property
    def checkpoints(self) -> Path:
        """Complete checkpoints, `checkpoint-STEP`."""
        return self.path / "checkpoints"

    @property
    def lock(self) -> Path:
        """Held by the process that writes here."""
        return self.path / ".lock"

    def read_manifest(self) -> dict[str, Any] | None:
        """run.json, or None where there is none; raises ArtefactError when it is damaged."""
        if not self.manifest.is_file():
            return None
        hint = "restore it, or use another `output`"
        values = read_object(self.manifest, hint)
        check_manifest(self.manifest, values, hint)
        return values

    def write_manifest(self, values: dict[str, Any]) -> None:
        """Replace run.json at once."""
        write_atomic(self.manifest, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def cache_folder() -> Path:
    """Where prepared data is kept between runs: $PEFTCLI_CACHE, or the user's cache folder."""
    named = os.environ.get("PEFTCLI_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peftcli"


def locked(run: RunDir) -> AbstractContextManager[None]:
    """Hold the run folder; raises ResourceError naming the process that holds it already."""
    return hold(run.lock)


def write_atomic(path: Path, text: str) -> None:
    """Write a file aside, sync it, and put it in place in one step."""
    aside = path.with_name(f".staging-{path.name}")
    try:
        with aside.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(path)
    except OSError:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def publish_folder(staging: Path, target: Path) -> None:
    """Sync every file of `staging` and rename it to `target`; an older `target` is replaced.

    Where the system can swap two names (Linux), one of the two is under `target` at every moment.
    """
    mode = 0o666 & ~_umask()  # some libraries write files that only their owner may read
    for file in sorted(staging.rglob("*")):
        if file.is_file():
            os.chmod(file, mode)
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    sync_folder(staging)
    old = target.with_name(f".staging-old-{target.name}")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        if exchange(staging, target):
            staging.rename(old)
        else:
            target.rename(old)
            staging.rename(target)
    else:
        staging.rename(target)
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system or the file system cannot."""
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if swap is None:
        return False
    here = ctypes.c_int(AT_FDCWD)
    names = os.fsencode(one), os.fsencode(other)
    return bool(swap(here, names[0], here, names[1], RENAME_EXCHANGE) == 0)


def remove_folder(path: Path) -> None:
    """Remove a folder so that half of it is never seen under its name."""
    aside = path.with_name(f".staging-old-{path.name}")
    path.rename(aside)
    shutil.rmtree(aside)


def _umask() -> int:
    current = os.umask(0o077)
    os.umask(current)
    return current


def sync_folder(path: Path) -> None:
    """Make a rename in `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
