"""The run folder before a run: what is refused there, and removing what an earlier run left."""

from __future__ import annotations

import shutil
from pathlib import Path

from peftcli.errors import ResourceError, UsageError
from peftcli.lock import holder, in_use
from peftcli.run_dir import OWN_NAMES, RunDir, write_atomic

PROBE_BYTES = 65536


def open_run(path: Path, *, resume: bool, overwrite: bool) -> RunDir:
    """The run folder, ready to be written to; raises UsageError with the ways out.

    A folder that holds a run is only touched with `resume` or `overwrite`; a folder that holds
    anything else is never touched.
    """
    run = RunDir(path)
    if resume and overwrite:
        raise UsageError(
            "--resume and --overwrite: one goes on with the run, the other removes it",
            "leave --overwrite away to go on",
        )
    check_place(path)
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


def check_place(path: Path) -> None:
    """Raise UsageError where a run folder cannot be; changes nothing."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"output: {path} is a file", "name a folder in `output`")
    foreign = [item.name for item in _entries(path) if item.name not in OWN_NAMES]
    foreign = [name for name in foreign if not name.startswith(".staging-")]
    if foreign and not RunDir(path).manifest.exists():
        raise UsageError(
            f"output: {path} holds files of something else ({', '.join(sorted(foreign)[:3])})",
            "name an empty or new folder in `output`",
        )
    _check_kinds(path)


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
