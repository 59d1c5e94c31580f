"""No plugins of pydantic: nothing here needs one, and looking for them makes for a slow start."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from types import ModuleType
from typing import Any

LOADER = "pydantic.plugin._loader"


class _NoPlugins(ModuleType):
    """What pydantic's own loader says where the variable below forbids every plugin.

    That one imports importlib.metadata first, and with it email, csv, zipfile and socket, before it
    looks at the variable. What a later pydantic may ask beside is the real loader's to answer.
    """

    @staticmethod
    def get_plugins() -> tuple[()]:
        return ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        del sys.modules[LOADER]
        return getattr(import_module(LOADER), name)


def no_plugins() -> None:
    """Have pydantic look for no plugins, unless the user has set which ones to leave out."""
    if os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__") == "__all__":
        sys.modules.setdefault(LOADER, _NoPlugins(LOADER))
