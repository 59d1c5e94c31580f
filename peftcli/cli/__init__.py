"""The commands: each file parses, calls `run()` and hands the result to be shown."""

import os

# Looking for plugins of pydantic reads the metadata of every installed package: a slow start.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

from peftcli.cli import train, merge, evaluate, estimate, recipes  # isort: skip  # order of --help
from peftcli.cli.app import app, main

__all__ = ["app", "estimate", "evaluate", "main", "merge", "recipes", "train"]
