"""What leaves the machine and reaches logs: no telemetry, nothing when offline, no token."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

# Read by the libraries when they are imported.
NO_TELEMETRY = {
    "HF_HUB_DISABLE_TELEMETRY": "1",  # TRL reports every trainer, the hub library every request
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "DO_NOT_TRACK": "1",
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
}
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
SECRET_NAME = re.compile(
    r"(?:^|_)(?:TOKEN|API_?KEY|ACCESS_?KEY|PASSWORD|PASSWD|SECRET(?:_KEY)?)$", re.IGNORECASE
)
# Access tokens of the hub, of W&B, of GitHub and of model services, and passwords in addresses.
SECRET = re.compile(
    r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}|\bwandb_v\d_\w{16,}"
    r"|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bsk-[\w-]{20,}|\bAKIA[0-9A-Z]{16}\b"
    r"|(?<=://)[^\s/@]+(?=@)"
)
SHORTEST = 8
HIDDEN = "***"


def no_telemetry() -> None:
    """Tell every library to report nothing; what the user set stays."""
    for name, value in NO_TELEMETRY.items():
        os.environ.setdefault(name, value)


def go_offline() -> None:
    """Forbid every download for the rest of the process, also where the libraries are loaded."""
    for name in OFFLINE:
        os.environ[name] = "1"
    for module in ("huggingface_hub.constants", "datasets.config"):
        loaded = sys.modules.get(module)
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            if loaded is not None and name in vars(loaded):
                vars(loaded)[name] = True


def redact(text: str) -> str:
    """The text without tokens: neither those of the environment nor what looks like one."""
    for value in secrets():
        text = text.replace(value, HIDDEN)
    return SECRET.sub(HIDDEN, text)


def secrets() -> list[str]:
    """The tokens and passwords of the environment."""
    found = os.environ.items()
    return [text for name, text in found if len(text) >= SHORTEST and SECRET_NAME.search(name)]


def holds_secret(text: str, known: Sequence[str]) -> bool:
    """Whether there is one of the known tokens in `text`, or what looks like one."""
    return any(value in text for value in known) or SECRET.search(text) is not None
