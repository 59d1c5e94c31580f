"""Tokens and passwords that somebody wrote into a recipe."""

from __future__ import annotations

from typing import Any

from peftcli.errors import RecipeError
from peftcli.privacy import holds_secret, secrets
from peftcli.recipe.document import Document, Path, dotted

SECRET_KEYS = (
    *("token", "hub_token", "hf_token", "auth_token", "access_token", "use_auth_token"),
    *("api_key", "wandb_api_key", "password", "secret"),
)


def refuse_secrets(document: Document) -> None:
    """Recipes are copied into manifests and model cards, so no token may stand in one."""
    known = secrets()
    found = [
        f"{_without_value(document.place(path))}: {dotted(path)}: this is a token or a password"
        for path, value in _every(document.values, ())
        if value is not None and (holds_secret(str(value), known) or _names_secret(path))
    ]
    if found:
        raise RecipeError(
            "\n".join(found),
            "remove it; tokens come from the environment (HF_TOKEN, WANDB_API_KEY) or "
            "`hf auth login`. If the file was shared, revoke it",
        )


def _names_secret(path: Path) -> bool:
    own = str(path[-1]).lower()
    return own in SECRET_KEYS


def _without_value(place: str) -> str:
    return place.partition("=")[0]


def _every(value: Any, path: Path) -> list[tuple[Path, Any]]:
    """Every scalar with its path."""
    if isinstance(value, dict):
        return [found for key, item in value.items() for found in _every(item, (*path, key))]
    if isinstance(value, list):
        return [found for i, item in enumerate(value) for found in _every(item, (*path, i))]
    return [(path, value)]
