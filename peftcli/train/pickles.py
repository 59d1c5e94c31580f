"""Checkpoints hold optimizer, schedule and random state as pickles; these may hold no code.

Everything is read here once, restricted to tensors and plain values and mapped instead of copied,
so that a planted file is refused before the trainer sees it.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from pickle import UnpicklingError

import torch
from transformers.trainer_pt_utils import safe_globals

from peftcli.errors import ArtefactError

STATES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt")
PICKLED = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
HINT = "do not resume from a checkpoint of somebody else; start again with --overwrite"


def check_states(checkpoint: Path) -> None:
    """Raise ArtefactError for a pickle that is foreign, compressed, or holds more than values."""
    for file in sorted(checkpoint.rglob("*")):
        if file.suffix not in PICKLED or not file.is_file():
            continue
        if file.name not in STATES or file.parent != checkpoint:
            raise ArtefactError(f"{file}: a pickle that no run of peftcli writes", HINT)
        if not _stored(file):
            raise ArtefactError(f"{file}: not as PyTorch writes it: it is compressed", HINT)
        try:
            with safe_globals():
                torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except (UnpicklingError, RuntimeError, ValueError, LookupError, TypeError) as error:
            raise _refused(file, error) from None
        except (OSError, EOFError, AttributeError, ImportError, zipfile.BadZipFile) as error:
            raise _refused(file, error) from None


def _stored(file: Path) -> bool:
    """Whether no entry of the archive takes more memory than it does on disk."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError):
        return True  # no archive at all, which mapping it refuses
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    return stored and sum(entry.file_size for entry in entries) <= file.stat().st_size


def _refused(file: Path, error: Exception) -> ArtefactError:
    # PyTorch's own text proposes to switch the restriction off.
    if isinstance(error, UnpicklingError):
        return ArtefactError(f"{file}: holds more than values, which was not run", HINT)
    return ArtefactError(f"{file}: not a file of PyTorch", HINT)
