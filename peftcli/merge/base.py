"""Which base an adapter belongs to, and where its files lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftcli.bundled import bundled
from peftcli.errors import ArtefactError, UsageError
from peftcli.merge.source import HUB_ID, AdapterSource
from peftcli.paths import expanded
from peftcli.untrusted import read_object

SMALL_FILES = (
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
    "*.md",
)


@dataclass(frozen=True)
class Base:
    """A base model on this disk."""

    name: str
    revision: str | None
    folder: Path
    commit: str | None


def find_base(adapter: AdapterSource, wanted: str | None, *, offline: bool, pickle: bool) -> Base:
    """The base the user named, or the one that the run or the adapter records.

    A hub model is downloaded: config, tokenizer, and the weights its index names. Raises UsageError
    when nothing of that name is here or on the hub.
    """
    name, revision = _named(adapter, wanted)
    try:
        own = bundled(name)
    except FileNotFoundError as error:
        raise UsageError(f"base model: {error}", "name it with --base-model") from None
    folder = own or expanded(name)
    commit = None
    if not folder.is_dir():
        if not HUB_ID.fullmatch(name) and "/" in name:
            raise UsageError(f"base model {name}: no such folder", "name it with --base-model PATH")
        folder = _download(name, revision, offline, pickle)
    if folder.parent.name == "snapshots":
        commit = folder.name
    if not (folder / "config.json").is_file():
        raise ArtefactError(f"{folder}: no config.json, so no base model", "name it rightly")
    return Base(name, revision, folder, commit)


def read_config(base: Base) -> dict[str, Any]:
    """The base's config.json; raises ArtefactError when it is damaged or already quantised."""
    file = base.folder / "config.json"
    config = read_object(file, "download it again")
    quantized = config.get("quantization_config")
    if isinstance(quantized, dict):
        method = str(quantized.get("quant_method", "unknown"))
        raise ArtefactError(
            f"{base.name}: its weights are quantised ({method}), and an update of a few bits "
            "would be lost in them",
            "name the 16-bit model it was made from: --base-model PATH_OR_ID"
            + ("; --base dequantized repeats the 4-bit rounding" if "bits" in method else ""),
        )
    return config


def _named(adapter: AdapterSource, wanted: str | None) -> tuple[str, str | None]:
    if wanted:
        return wanted, None
    model = ((adapter.manifest or {}).get("recipe") or {}).get("model")
    if isinstance(model, dict) and model.get("name"):
        return str(model["name"]), model.get("revision")
    name = adapter.config.get("base_model_name_or_path")
    if not name:
        raise UsageError(
            f"{adapter.name}: does not record its base model", "name it with --base-model"
        )
    return str(name), adapter.config.get("revision")


def _download(name: str, revision: str | None, offline: bool, pickle: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*SMALL_FILES, "model*.safetensors", *(["pytorch_model*.bin"] if pickle else [])]
    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=patterns, local_files_only=offline
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise UsageError(
            f"base model {name}: neither a folder here nor given by the hub: "
            f"{str(error).splitlines()[0]}",
            "name it with --base-model; for gated models log in: hf auth login",
        ) from None
    return Path(folder)
