"""How the program starts: what it leaves out so that a short command is short."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from peftcli.cli import app
from peftcli.cli.app import alone

COMMANDS = ("train", "merge", "eval", "chat", "estimate", "schema", "recipes")


def printed(code: str, **environment: str) -> list[str]:
    """The words that a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_built_alone_is_the_same(name: str) -> None:
    one = alone([name])
    assert len(one.registered_commands) + len(one.registered_groups) == 1
    whole = CliRunner().invoke(app, [name, "--help"], prog_name="peftcli")
    alike = CliRunner().invoke(one, [name, "--help"], prog_name="peftcli")
    assert whole.exit_code == alike.exit_code == 0
    assert alike.output == whole.output
    assert f"peftcli {name}" in alike.output


def test_every_command_is_built_where_none_is_named() -> None:
    assert all(alone(words) is app for words in ([], ["--help"], ["estimat"], ["--json"]))
    listed = CliRunner().invoke(app, ["--help"]).output
    assert all(f"  {name} " in listed for name in COMMANDS)


def test_the_collector_is_off_where_no_model_is_loaded() -> None:
    run = "import gc, sys\nfrom peftcli.__main__ import main\nsys.argv = ['peftcli', 'schema']\n"
    state = "print('\\n', gc.isenabled(), gc.get_freeze_count() > 0)"
    assert printed(f"{run}try:\n    main()\nexcept SystemExit:\n    pass\n{state}")[-2:] == [
        "False",
        "True",
    ]


def test_the_collector_is_on_where_a_model_is_loaded() -> None:
    code = (
        "import gc\ngc.disable()\nfrom peftcli.cli.importing import large_imports\n"
        "with large_imports():\n    print(gc.isenabled())\nprint(gc.isenabled())"
    )
    assert printed(code) == ["False", "True"]
