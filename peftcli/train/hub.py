"""Upload the result to the hub, after everything that could fail early was checked early."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from peftcli.errors import ResourceError, UsageError

# OSError, and the base error of whichever HTTP client the hub library uses.
NETWORK_ERRORS: tuple[type[Exception], ...] = HfHubHTTPError.__bases__


def check_upload(repository: str) -> None:
    """Raise UsageError when an upload at the end of the run could not work."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UsageError(f"--push-to-hub {repository}: {error}", "write OWNER/NAME") from None
    if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        raise UsageError(
            f"--push-to-hub {repository}: downloads and uploads are switched off",
            "run without --offline and HF_HUB_OFFLINE",
        )
    if get_token() is None:
        raise UsageError(
            f"--push-to-hub {repository}: no token for the hub",
            "log in with `hf auth login`, or set HF_TOKEN",
        )


def upload(folder: Path, repository: str) -> str:
    """Upload `folder` as the private model repository `repository`; returns its address.

    Raises ResourceError when the hub refuses or cannot be reached; the run itself is safe then.
    """
    api = HfApi()
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Add adapter")
    except NETWORK_ERRORS as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ResourceError(
            f"--push-to-hub {repository}: {reason}",
            f"the run is finished and safe; upload it later: hf upload {repository} {folder}",
        ) from None
    return str(address)
