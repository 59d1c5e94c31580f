"""What `merge` is pointed at -> adapter folder, its configuration, and the run it came from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftcli.errors import ArtefactError, UsageError
from peftcli.paths import expanded
from peftcli.recipe.schema import Recipe
from peftcli.run_dir import RunDir
from peftcli.untrusted import read_object

CONFIG = "adapter_config.json"
MERGE_REPORT = "merge.json"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SHOWN = 5  # adapters that are named
ADAPTER_FILES = ("adapter_*", "*.json", "*.jinja", "*.model", "*.txt", "README.md")


@dataclass(frozen=True)
class AdapterSource:
    """A trained adapter in PEFT's format."""

    name: str
    """As the user named it."""
    folder: Path
    config: dict[str, Any]
    """adapter_config.json."""
    run: RunDir | None
    manifest: dict[str, Any] | None
    """run.json of the run that made it; None for anyone else's adapter."""

    def recipe(self) -> Recipe | None:
        """The recipe of the run that made it; raises ArtefactError when it is not valid."""
        if self.manifest is None or self.run is None:
            return None
        try:
            return Recipe.model_validate(self.manifest["recipe"])
        except (ValueError, KeyError):
            raise ArtefactError(
                f"{self.run.manifest}: its recipe is not valid here",
                "use the version of peftcli that run.json names, or merge the adapter folder "
                "from another place with --base-model",
            ) from None


def find_adapter(source: Path, *, offline: bool = False) -> AdapterSource:
    """The adapter in a run folder, an adapter folder, a checkpoint, or a repository on the hub.

    Raises UsageError where there is none, and ArtefactError for damaged JSON.
    """
    folder = expanded(source)
    if not folder.exists() and HUB_ID.fullmatch(str(source)):
        folder = _download(str(source), offline)
    if (folder / CONFIG).is_file():
        run = _run_around(folder)
    elif (folder / "run.json").is_file():
        run = RunDir(folder)
        folder = _adapter_of(run)
    else:
        raise UsageError(f"{source}: {_what_it_is(folder)}", "name a run folder or a PEFT adapter")
    manifest = run.read_manifest() if run is not None else None
    return AdapterSource(str(source), folder, _read_config(folder / CONFIG), run, manifest)


def _adapter_of(run: RunDir) -> Path:
    if (run.adapter / CONFIG).is_file():
        return run.adapter
    if (run.model / "config.json").is_file():
        raise UsageError(
            f"{run.path}: full fine-tuning needs no merge", f"{run.model} is the whole model"
        )
    status = (run.read_manifest() or {}).get("status")
    newest = max(run.checkpoints.glob("checkpoint-*"), key=_step, default=None)
    hint = f"merge a checkpoint: {newest}" if newest else "finish the run: train --resume"
    raise UsageError(f"{run.path}: the run is {status} and holds no adapter yet", hint)


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isascii() and number.isdecimal() else -1


def _run_around(folder: Path) -> RunDir | None:
    """The run that a folder called `adapter` or a checkpoint belongs to."""
    if folder.name == "adapter" and (folder.parent / "run.json").is_file():
        return RunDir(folder.parent)
    run = RunDir(folder.resolve().parent.parent)
    inside = folder.resolve().parent == run.checkpoints
    return run if inside and run.manifest.is_file() else None


def _what_it_is(folder: Path) -> str:
    if not folder.exists():
        return "no such folder"
    if not folder.is_dir():
        return "a file, not a folder"
    if (folder / MERGE_REPORT).is_file():
        return "a merged model, not an adapter"
    if (folder / "config.json").is_file():
        return "a whole model, not an adapter"
    inside = sorted(config.parent.name for config in folder.glob(f"*/{CONFIG}"))
    if inside:
        return f"no adapter itself; those in it are {', '.join(inside[:SHOWN])}"
    return f"holds neither run.json nor {CONFIG}"


def _read_config(file: Path) -> dict[str, Any]:
    return read_object(file, "restore it from where the adapter came from")


def _download(name: str, offline: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = list(ADAPTER_FILES)
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=offline))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise UsageError(
            f"{name}: no such folder, and the hub did not give it: {str(error).splitlines()[0]}",
            "check the path, the name on the hub, and the network",
        ) from None
