"""Errors of the disk, whichever library meets them, as one message."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from peftcli.errors import ResourceError
from peftcli.run_dir import RunDir
from peftcli.train import checkpoints

# PyTorch's writer says only that something could not be written.
TORCH_WRITER = (
    "PytorchStreamWriter",
    "inline_container",
    "iostream",
    "open file",
    "unexpected pos",
)
PROBE_BYTES = 1 << 20
HINTS = {
    errno.ENOSPC: "free disk space",
    errno.EDQUOT: "free disk space, or ask for a larger quota",
    errno.EROFS: "make the disk writable",
    errno.EACCES: "make it yours to write and to read",
    errno.EPERM: "make it yours to write and to read",
    errno.ENOENT: "restore what was removed",
}


@contextmanager
def disk_errors(folder: RunDir) -> Iterator[None]:
    """Turn what a disk refuses into a ResourceError that says how to go on."""
    try:
        yield
    except BaseException as error:  # tokenizers raises the plain Exception for a full disk
        found = _number(error, folder.path)
        if found is None:
            raise
        place = error.filename if isinstance(error, OSError) else None
        raise ResourceError(
            f"{place or folder.path}: {os.strerror(found).lower()}",
            f"{HINTS.get(found, 'check the disk')}; {how_to_go_on(folder)}",
        ) from error


def how_to_go_on(folder: RunDir) -> str:
    """What starts a run again that has stopped."""
    saved = max(checkpoints.steps(folder.checkpoints), default=0)
    if (folder.read_manifest() or {}).get("status") == "finished":
        return "the run itself is finished"
    if saved:
        return f"the same command with --resume goes on from checkpoint-{saved}"
    if folder.manifest.is_file():
        return "the same command with --resume starts at step 0"
    return "the same command starts again"


def check_space(folder: RunDir, needed: int) -> None:
    """Raise ResourceError when the disk cannot hold `needed` bytes of checkpoints and result."""
    free = shutil.disk_usage(folder.path).free
    if needed > free:
        raise ResourceError(
            f"output: {folder.path} has {free / 1e6:,.0f} MB free, and checkpoints and result "
            f"take about {needed / 1e6:,.0f} MB",
            "free disk space, name a folder on another disk, or lower training.keep_checkpoints",
        )


def _number(error: BaseException, folder: Path) -> int | None:
    """The error number of a disk's refusal; None for an error of another kind."""
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    if not isinstance(error, SafetensorError | RuntimeError) and type(error) is not Exception:
        return None
    text = str(error)
    told = re.search(r"os error (\d+)", text)
    if told:
        return int(told[1])
    if not isinstance(error, RuntimeError) or not any(mark in text for mark in TORCH_WRITER):
        return None
    return _asked(folder)


def _asked(folder: Path) -> int:
    """What the disk says to another file, where a library kept the reason to itself."""
    probe = folder / ".staging-probe"
    try:
        probe.write_bytes(bytes(PROBE_BYTES))
    except OSError as error:
        return error.errno or errno.EIO
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
    return errno.EIO
