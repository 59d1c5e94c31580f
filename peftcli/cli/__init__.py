"""The commands: each file parses, calls `run()` and hands the result to be shown."""

from peftcli.cli import train, merge, evaluate, estimate, recipes  # isort: skip  # order of --help
from peftcli.cli.app import app, main
from peftcli.cli.plugins import no_plugins

no_plugins()  # no command has imported pydantic yet

__all__ = ["app", "estimate", "evaluate", "main", "merge", "recipes", "train"]
