"""run.json: what was run on what, so that a result can be traced and repeated."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from peftcli import __version__
from peftcli.data.report import DataReport
from peftcli.fingerprint import Fingerprint
from peftcli.models import Device
from peftcli.recipe.load import resolved
from peftcli.recipe.schema import Recipe
from peftcli.train.plan import Plan

LIBRARIES = (
    *("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate"),
    "tokenizers",
)


def describe(
    recipe: Recipe,
    *,
    base: Fingerprint | None,
    base_folder: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    data: DataReport,
    plan: Plan,
    device: Device,
    trainable: int,
    total: int,
) -> dict[str, Any]:
    """The manifest of a run that is about to start."""
    return {
        "status": "running",
        "recipe": resolved(recipe),
        "base": {
            "name": recipe.model.name,
            "revision": recipe.model.revision,
            "commit": _commit(base_folder),
            "fingerprint": asdict(base) if base else None,
        },
        "tokenizer": {
            "sha256": _sha256(tokenizer.backend_tokenizer.to_str()),
            "chat_template_sha256": _sha256(str(tokenizer.chat_template or "")),
            "vocabulary": len(tokenizer),
        },
        "data": data.to_dict(),
        "plan": asdict(plan),
        "device": asdict(device),
        "trainable_parameters": trainable,
        "parameters": total,
        "seed": recipe.seed,
        "deterministic": device.kind == "cpu",
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "git": git_state(),
    }


def versions() -> dict[str, str]:
    """Versions of the program, Python and the libraries that decide the result."""
    own = {"peftcli": __version__, "python": platform.python_version()}
    libraries = {name: version(name) for name in LIBRARIES}
    return own | libraries | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def git_state() -> dict[str, Any] | None:
    """Commit of the working folder and whether it has changes; None outside a repository."""
    try:
        commit = _git("rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def _commit(folder: Path | None) -> str | None:
    """The commit of a hub snapshot, which is its folder's name in the cache."""
    return folder.name if folder is not None and folder.parent.name == "snapshots" else None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
