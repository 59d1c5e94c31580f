"""One model's config.json from the hub: a few kilobytes, kept; never any weights."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from peftcli.architecture.keys import FILE_LIMIT
from peftcli.errors import UsageError
from peftcli.run_dir import cache_folder, write_atomic

SECONDS = 10


def fetch_config(hub_id: str, revision: str) -> Path:
    """The file in our cache, fetched the first time; raises UsageError with what to do."""
    kept = cache_folder() / "configs" / hub_id.replace("/", "--") / _plain(revision)
    file = kept / "config.json"
    if file.is_file():
        return file
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "", "false", "False"):
        raise _refused(hub_id, "HF_HUB_OFFLINE forbids asking the hub")
    text = _get(hub_id, revision)
    kept.mkdir(parents=True, exist_ok=True)
    write_atomic(file, text)
    return file


def _get(hub_id: str, revision: str) -> str:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    if not endpoint.startswith(("https://", "http://")):
        raise _refused(hub_id, f"HF_ENDPOINT is {endpoint!r}, which is no web address")
    where = f"{urllib.parse.quote(hub_id)}/resolve/{urllib.parse.quote(revision, safe='')}"
    request = urllib.request.Request(f"{endpoint}/{where}/config.json")
    token = os.environ.get("HF_TOKEN") or _stored_token()
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            content: bytes = answer.read(FILE_LIMIT + 1)
    except urllib.error.HTTPError as error:
        raise _refused(hub_id, _meaning(error.code)) from None
    except (OSError, ValueError) as error:  # no network, or no name for that host
        reason = getattr(error, "reason", error)
        raise _refused(hub_id, f"the hub cannot be reached: {reason}") from None
    if len(content) > FILE_LIMIT:
        raise _refused(hub_id, "its config.json is larger than 16 MiB, which none is")
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        raise _refused(
            hub_id, "what the hub sent is not JSON; is there a page to log in to?"
        ) from None
    return content.decode("utf-8", errors="replace")


def _meaning(code: int) -> str:
    if code in (401, 403):
        return "the hub says it is gated, private or not there; your token opens it (hf auth login)"
    if code == 404:
        return "the hub has no such model, revision, or config.json in it"
    return f"the hub answered {code}"


def _refused(hub_id: str, why: str) -> UsageError:
    from peftcli.architecture.catalog import nearest_names

    near = ", ".join(nearest_names(hub_id))
    return UsageError(
        f"model: {hub_id}: {why}",
        f"Give the path of its config.json{f', or one of {near}' if near else ''}.",
    )


def _stored_token() -> str | None:
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    file = Path(os.environ.get("HF_TOKEN_PATH") or home / "token")
    try:
        return file.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _plain(revision: str) -> str:
    return urllib.parse.quote(revision, safe="")
