"""Where the files of a named model lie: bundled, in a folder here, or in the hub's cache."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from peftcli.bundled import bundled
from peftcli.errors import UsageError
from peftcli.paths import expanded
from peftcli.recipe.schema import Model
from peftcli.untrusted import custom_code


def locate(model: Model) -> str:
    """The folder of a bundled or local model, or the hub id as it stands."""
    try:
        own = bundled(model.name)
    except FileNotFoundError as error:
        raise UsageError(f"model: {error}", "write one of those") from None
    if own is not None:
        return str(own)
    path = expanded(model.name)
    if path.is_dir():
        return str(path)
    if path.is_file():
        raise UsageError(f"model: {path} is a file", "name the folder that holds config.json")
    if model.name.startswith((".", "/", "~")) or model.name.count("/") > 1:
        beside = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
        near = get_close_matches(path.name, beside, n=1)
        guess = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise UsageError(f"model: {model.name}: no such folder{guess}", "name an existing folder")
    return model.name


def base_folder(model: Model) -> Path | None:
    """Where the base's files lie on this disk; None before a hub model was downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    located = locate(model)
    if Path(located).is_dir():
        return Path(located)
    try:
        return Path(snapshot_download(located, revision=model.revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def code_of(model: Model) -> list[str]:
    """What the code is that a model needs, as far as its files are on this disk."""
    from huggingface_hub import try_to_load_from_cache

    located = locate(model)
    if Path(located).is_dir():
        return custom_code(Path(located))
    cached = try_to_load_from_cache(located, "config.json", revision=model.revision)
    return custom_code(Path(cached).parent) if isinstance(cached, str) else []
