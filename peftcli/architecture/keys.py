"""Reads a config.json: whole numbers within reason, and errors that name the key."""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftcli.errors import ArtefactError

FILE_LIMIT = 16 * 2**20
LARGEST = 10**9
MOST_LAYERS = 10_000


class Keys:
    """The keys of one section of a configuration, with the class defaults beneath them."""

    def __init__(
        self, values: Mapping[str, Any], where: str, defaults: Mapping[str, Any] | None = None
    ) -> None:
        merged = {**(defaults or {}), **values}
        self.values = {key: value for key, value in merged.items() if value is not None}
        self.where = where

    def wrong(self, name: str, value: object, wanted: str) -> ArtefactError:
        shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
        return ArtefactError(
            f"{self.where}: {name} is {shown}, but must be {wanted}",
            "The file is damaged or describes another kind of model; fetch it again.",
        )

    def find(self, *names: str) -> tuple[str, Any]:
        """The first of several spellings of one key that is set; (name, None) where none is."""
        return next(((n, self.values[n]) for n in names if n in self.values), (names[0], None))

    def optional(self, *names: str, low: int = 1, high: int = LARGEST) -> int | None:
        """A whole number, or None where the key is absent or null."""
        name, value = self.find(*names)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(name, value, f"a whole number from {low} to {high}")
        return value

    def integer(self, *names: str, low: int = 1, high: int = LARGEST) -> int:
        """A whole number that must be there."""
        value = self.optional(*names, low=low, high=high)
        if value is None:
            raise ArtefactError(
                f"{self.where}: {' or '.join(names)} is missing",
                "A decoder's config.json has it; is this the file of the model itself?",
            )
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def text(self, *names: str) -> str | None:
        name, value = self.find(*names)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, value, "a text")
        return value

    def integers(self, name: str, high: int) -> list[int]:
        """A list of whole numbers from 0 up to `high`; empty where the key is absent."""
        value = self.values.get(name, [])
        good = isinstance(value, list) and len(value) <= MOST_LAYERS
        if not good or any(type(x) is not int or not 0 <= x <= high for x in value):
            raise self.wrong(name, value, f"a list of whole numbers from 0 to {high}")
        return list(value)

    def texts(self, name: str) -> list[str] | None:
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) > MOST_LAYERS:
            raise self.wrong(name, value, "a list of texts")
        if not all(isinstance(item, str) for item in value):
            raise self.wrong(name, value, "a list of texts")
        return list(value)

    def section(self, name: str, defaults: Mapping[str, Any] | None = None) -> Keys | None:
        """A nested object, or None where the key is absent or null."""
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, value, "an object")
        return Keys(value, f"{self.where}: {name}", defaults)


def read_json(path: Path) -> Any:
    """The content of a JSON file that nobody has vouched for.

    Raises ArtefactError when it is missing, larger than 16 MiB, or not JSON.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe or a device would be read without an end
            raise ArtefactError(f"{path}: no regular file", "Fetch the file again.")
        if found.st_size > FILE_LIMIT:
            raise ArtefactError(f"{path}: larger than 16 MiB, which no config.json is")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtefactError(
            f"{path}: no such file", "Give a config.json or the folder of a model."
        ) from None
    except OSError as error:
        raise ArtefactError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"{path}: not JSON: {error}", "Fetch the file again.") from error
