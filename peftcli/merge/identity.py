"""Whether base and adapter belong together, before anything is computed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from peftcli.errors import ArtefactError, UsageError
from peftcli.fingerprint import check_same_base
from peftcli.merge.base import Base, find_base
from peftcli.merge.source import MERGE_REPORT, AdapterSource
from peftcli.untrusted import read_object


def check_belongs(adapter: AdapterSource, base: Base) -> None:
    """Raise ArtefactError for another base than the adapter's, or one that holds it already.

    After training on a checkpoint that was quantised already, the 16-bit one has other weights.
    """
    report = base.folder / MERGE_REPORT
    if report.is_file():
        inside = read_object(report).get("adapter_sha256")
        if isinstance(inside, list) and adapter_digest(adapter.folder) in inside:
            raise ArtefactError(
                f"{base.folder}: this adapter is merged into it already",
                "name the original base with --base-model",
            )
    if any(base.folder.glob("*.safetensors")) and not trained_on_stored(adapter):
        check_same_base(adapter.folder, base.folder)


def trained_on_stored(adapter: AdapterSource) -> bool:
    """Whether the recorded base is here and stored quantised: made from one that is not known."""
    try:
        trained = find_base(adapter, None, offline=True, pickle=False)
    except (UsageError, ArtefactError):
        return False
    config = read_object(trained.folder / "config.json")
    return isinstance(config.get("quantization_config"), dict)


def check_output(
    output: Path, adapters: Sequence[AdapterSource], base: Base, *, overwrite: bool
) -> None:
    """Raise UsageError when the output would replace an input or something foreign."""
    target = output.resolve()
    for folder in (base.folder, *(adapter.folder for adapter in adapters)):
        used = folder.resolve()
        if target == used or target in used.parents or used in target.parents:
            raise UsageError(
                f"--output {output}: is, holds or lies in {folder}, which is read",
                "name another folder",
            )
    _check_replaceable(output, target)
    if not output.exists():
        return
    if not output.is_dir():
        raise UsageError(f"--output {output}: is a file", "name a folder")
    filled = any(output.iterdir())
    if filled and not (output / MERGE_REPORT).is_file():
        raise UsageError(f"--output {output}: holds files of something else", "name a new folder")
    if filled and not overwrite:
        raise UsageError(f"--output {output}: holds a merged model", "--overwrite replaces it")


def _check_replaceable(output: Path, target: Path) -> None:
    """A merge is made beside its place and takes it by one rename, which some places forbid."""
    here = Path.cwd()
    if target == here or target in here.parents:
        raise UsageError(
            f"--output {output}: is or holds the folder you are in, and is put in place as a whole",
            f"name a folder in it: --output {output / 'merged'}",
        )
    if target.is_mount():
        raise UsageError(
            f"--output {output}: is a mount point, and a merge is put in place as a whole",
            f"name a folder in it: --output {output / 'merged'}",
        )


def adapter_digest(folder: Path) -> str:
    """sha256 of an adapter's weights, in hex."""
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).is_file():
            with (folder / name).open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
    return ""
