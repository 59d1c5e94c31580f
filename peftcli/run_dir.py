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

from peftcli.errors import ResourceError, UsageError
from peftcli.lock import hold, holder, in_use
from peftcli.records import check_manifest
from peftcli.untrusted import read_object

Status = Literal["running", "interrupted", "failed", "finished"]


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


PROBE_BYTES = 65536
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
OWN_NAMES = (
    *("recipe.yaml", "run.json", "metrics.jsonl", "loss.png", "adapter", "model", "checkpoints"),
    *(".lock", "merged", "eval.json", "report.html", "tracking"),
)


def cache_folder() -> Path:
    """Where prepared data is kept between runs: $PEFTCLI_CACHE, or the user's cache folder."""
    named = os.environ.get("PEFTCLI_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peftcli"


def open_run(path: Path, *, resume: bool, overwrite: bool) -> RunDir:
    """The run folder, ready to be written to; raises UsageError with the ways out.

    A folder that holds a run is only touched with `resume` or `overwrite`; a folder that holds
    anything else is never touched.
    """
    run = RunDir(path)
    if path.exists() and not path.is_dir():
        raise UsageError(f"output: {path} is a file", "name a folder in `output`")
    foreign = [item.name for item in _entries(path) if item.name not in OWN_NAMES]
    foreign = [name for name in foreign if not name.startswith(".staging-")]
    if foreign and not run.manifest.exists():
        raise UsageError(
            f"output: {path} holds files of something else ({', '.join(sorted(foreign)[:3])})",
            "name an empty or new folder in `output`",
        )
    _check_kinds(path)
    manifest = run.read_manifest()
    owner = holder(run.lock)
    if owner:
        raise in_use(run.lock, owner)
    if manifest is not None and not overwrite:
        _refuse_second_run(run, str(manifest.get("status")), resume)
    if resume and manifest is None:
        raise UsageError(f"--resume: {path} holds no run", "start it without --resume")
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_atomic(path / ".staging-probe", " " * PROBE_BYTES)
        (path / ".staging-probe").unlink()
    except OSError as error:
        raise ResourceError(
            f"output: {path} cannot be written: {error.strerror}",
            "free disk space, or make it writable, or name another folder",
        ) from None
    return run


def sweep(run: RunDir) -> None:
    """Remove what a process that was killed had begun to write; call it with the lock held."""
    names = [item.name for item in (run.adapter, run.model, run.recipe, run.manifest)]
    names += [run.metrics.name, run.loss_plot.name, "probe"]
    begun = [run.path / f".staging-{name}" for name in names]
    begun += [*run.path.glob(".staging-old-*"), *run.path.glob(".staging-.staging-*")]
    begun += run.checkpoints.glob(".staging-*")
    for item in begun:
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item)
        else:
            item.unlink(missing_ok=True)


def clear(run: RunDir) -> None:
    """Remove what a run left; foreign files stay."""
    for name in OWN_NAMES:
        target = run.path / name
        if target.is_symlink() or target.is_file():
            if name != ".lock":
                target.unlink()
        elif target.is_dir():
            shutil.rmtree(target)


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


def _entries(path: Path) -> list[Path]:
    return list(path.iterdir()) if path.is_dir() else []


def _check_kinds(path: Path) -> None:
    """Refuse links out of the folder, and pipes or folders where a run keeps a file."""
    for name in OWN_NAMES:
        item = path / name
        if item.is_symlink() and not item.resolve().is_relative_to(path.resolve()):
            raise UsageError(
                f"output: {item} is a link to {item.readlink()}, outside the run folder",
                "remove the link; to keep runs on another disk, link the whole run folder",
            )
        kind = "file" if "." in name else "folder"
        if item.exists() and not (item.is_file() if kind == "file" else item.is_dir()):
            raise UsageError(
                f"output: {item} is no {kind} of a run", "remove it, or name another `output`"
            )


def _refuse_second_run(run: RunDir, status: str, resume: bool) -> None:
    if status == "finished":
        raise UsageError(
            f"output: {run.path} holds a finished run"
            + ("; there is nothing to resume" if resume else ""),
            "--overwrite replaces it; or name another folder in `output`",
        )
    if not resume:
        raise UsageError(
            f"output: {run.path} holds a run that is {status}",
            "--resume goes on with it, --overwrite replaces it; or name another `output`",
        )
