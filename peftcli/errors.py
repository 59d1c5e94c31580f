"""Errors that a user can act on, and the exit codes of the program."""

from __future__ import annotations

import errno
from enum import IntEnum

DISK_ERRORS = {errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENXIO, errno.ESTALE}


class ExitCode(IntEnum):
    """What the process returns; stable, documented in the README."""

    DONE = 0
    BUG = 1
    USAGE = 2  # recipe, data or command line
    RESOURCES = 3  # memory, disk, lock, device
    ARTEFACT = 4  # untrusted, corrupt or incompatible files
    NUMERICAL = 5  # not a number, or a check of the result failed
    REGRESSION = 10
    INCONCLUSIVE = 11
    INTERRUPTED = 75  # stopped by a signal; `--resume` goes on


class PeftcliError(Exception):
    """Something the user can mend; `message` says what and where, `hint` what to do."""

    exit_code = ExitCode.USAGE

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(PeftcliError):
    """The command line asks for something that cannot be."""


class RecipeError(PeftcliError):
    """The recipe is wrong; the message holds one line for each problem."""


class DataError(PeftcliError):
    """A row, a file or a split of the data cannot be used."""


class ResourceError(PeftcliError):
    """Memory, disk, a lock or a device is missing."""

    exit_code = ExitCode.RESOURCES


class ArtefactError(PeftcliError):
    """A model, adapter or checkpoint is corrupt, untrusted or of another kind."""

    exit_code = ExitCode.ARTEFACT


class NumericalError(PeftcliError):
    """Training or a check produced numbers that must not be used."""

    exit_code = ExitCode.NUMERICAL


class InterruptedRun(PeftcliError):
    """The run stopped on a signal after saving; it can be resumed."""

    exit_code = ExitCode.INTERRUPTED


class RegressionFound(PeftcliError):
    """A gate of an evaluation is broken, and chance does not explain it."""

    exit_code = ExitCode.REGRESSION


class Inconclusive(PeftcliError):
    """Proof was asked for, and the rows are too few to give it."""

    exit_code = ExitCode.INCONCLUSIVE


def unreadable(place: str, error: OSError, kind: type[PeftcliError]) -> PeftcliError:
    """What to raise for a file that is there and cannot be read.

    ResourceError where the disk fails, `kind` where the user can mend it.
    """
    message = f"{place}: cannot be read: {error.strerror or error}"
    if error.errno in DISK_ERRORS:
        return ResourceError(message, disk_hint(error))
    return kind(message, "check its name and its permissions")


def disk_hint(error: OSError) -> str:
    """What to do about an error of the operating system."""
    if error.errno == errno.EPIPE:
        return "keep the program open that reads it"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space"
    if error.errno in DISK_ERRORS:
        return "check the disk, and whether it is still mounted and writable"
    return "check the path and its permissions"
