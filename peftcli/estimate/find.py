"""A model's architecture by whatever a recipe calls it."""

from __future__ import annotations

import os
from pathlib import Path

from peftcli.architecture.config import Architecture, read_architecture
from peftcli.bundled import bundled
from peftcli.errors import ArtefactError, UsageError
from peftcli.paths import expanded
from peftcli.untrusted import custom_code


def find_architecture(
    name: str, revision: str | None = None, *, network: bool = False
) -> Architecture:
    """Look for `bundled:NAME`, a folder or config.json, the hub's cache, the catalog, the hub.

    Only with `network` is the hub asked, for config.json alone, which is then kept. Raises
    UsageError, with the nearest names, where none of them knows the model.
    """
    try:
        own = bundled(name)
    except FileNotFoundError as error:
        raise UsageError(f"model: {error}", "Write one of those.") from None
    path = own or expanded(name)
    if _exists(path):
        return read_architecture(path)
    cached = cached_config(name)
    if cached is not None:
        return read_architecture(cached)
    from peftcli.architecture.catalog import find_model

    known = find_model(name) if revision is None else None
    if known is not None:
        return known
    if network and name.count("/") == 1 and not name.startswith((".", "/", "~")):
        from peftcli.estimate.hub import fetch_config

        return read_architecture(fetch_config(name, revision or "main"))
    raise _unknown(name)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that no file can have
        return False


def _unknown(name: str) -> UsageError:
    from peftcli.architecture.catalog import nearest_names

    near = ", ".join(nearest_names(name))
    return UsageError(
        f"model: {name!r} is no local folder, not downloaded, and not in the catalog",
        f"Give the path of its config.json{f', or one of {near}' if near else ''}.",
    )


def known_architecture(name: str) -> Architecture | None:
    """The same, or None where the model would have to be looked up on the hub."""
    try:
        return find_architecture(name)
    except UsageError:
        return None
    except ArtefactError:
        if custom_code(expanded(name)):  # loading it names the code that it needs
            return None
        raise


def cached_config(hub_id: str) -> Path | None:
    """The newest config.json of a hub model that this machine has downloaded."""
    if hub_id.count("/") != 1:
        return None
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    snapshots = hub / f"models--{hub_id.replace('/', '--')}" / "snapshots"
    found = [path for path in snapshots.glob("*/config.json") if path.is_file()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)
