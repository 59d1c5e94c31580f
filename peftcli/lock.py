"""A lock on a folder, held by a live process only.

The operating system drops the lock when its process ends, however it ends, so a lock left by a
dead process holds nobody back and a reused process number cannot be taken for its owner.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from peftcli.errors import ResourceError

# Where a file system has no locks, the owner that the file names is looked for.
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
PATIENCE = 0.3  # seconds: another start may be looking at the lock just now
OWNER = re.compile(r"process (\d+) on (\S+), started (\d+)")


@contextmanager
def hold(file: Path) -> Iterator[None]:
    """Hold the folder of `file`; raises ResourceError naming the process that holds it already."""
    with file.open("a+", encoding="utf-8") as stream:
        until = time.monotonic() + PATIENCE
        while (owner := _taken(stream, fcntl.LOCK_EX)) and time.monotonic() < until:
            time.sleep(0.05)
        if owner:
            raise in_use(file, owner)
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}, started {_started()}\n")
        stream.flush()
        try:
            yield
        finally:
            with suppress(OSError):
                stream.truncate(0)


def holder(file: Path) -> str | None:
    """The live process that holds the lock; None where there is none."""
    try:
        with file.open("r", encoding="utf-8") as stream:
            return _taken(stream, fcntl.LOCK_SH)
    except FileNotFoundError:
        return None


def in_use(file: Path, owner: str) -> ResourceError:
    """The error of a folder that another process writes to."""
    return ResourceError(
        f"{file.parent} is in use by {owner}", "wait for it, or use another `output`"
    )


def _taken(stream: TextIO, kind: int) -> str | None:
    """Take the lock; who has it, if somebody else does."""
    try:
        fcntl.flock(stream, kind | fcntl.LOCK_NB)
    except OSError as error:
        stream.seek(0)
        owner = stream.read().strip()
        if error.errno not in NO_LOCKS:
            return owner.partition(", started")[0] or "another process"
        return owner.partition(", started")[0] if alive(owner) else None
    return None


def alive(owner: str) -> bool:
    """Whether the process that a lock file names still runs here, and is not a later one."""
    match = OWNER.fullmatch(owner)
    if match is None or match[2] != socket.gethostname():
        return False
    started = _started(match[1])
    return started is not None and started == match[3]


def _started(process: str = "self") -> str | None:
    """When a process began, in ticks since the machine did; None when there is none."""
    try:
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "0" if process == "self" else None
    return status.rpartition(")")[2].split()[19]
