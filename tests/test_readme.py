"""README.md tells the truth: its generated parts are fresh and what it names is there."""

from __future__ import annotations

import os
import re
import shlex
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import yaml
from forked import script, server
from rich.text import Text
from typer.main import get_command

from peftcli.cli import app
from peftcli.data.formats import FORMATS
from peftcli.errors import ExitCode
from peftcli.methods import METHODS
from peftcli.recipe.load import load_recipe
from peftcli.run_dir import OWN_NAMES

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = sorted(
    {
        line.split("  #")[0].removeprefix("$ ").strip()
        for language, text in BLOCKS
        if language in ("bash", "console")
        for line in text.splitlines()
        if re.match(r"(\$ )?(peftcli|scripts/)", line)
    }
    | set(re.findall(r"`((?:peftcli [a-z]|scripts/)[^`]*)`", README))
)
PICTURES = sorted(path.stem for path in (ROOT / "scripts" / "assets").glob("*.ansi"))


def test_nothing_generated_is_stale() -> None:
    done = server().run("--check", program=script(ROOT / "scripts" / "update_readme"))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_exists_with_its_options(line: str) -> None:
    words = shlex.split(line)
    if words[0] != "peftcli":
        assert os.access(ROOT / words[0], os.X_OK), f"{words[0]} is no script"
        return
    command: Any = get_command(app)
    position = 1
    while position < len(words) and words[position] in getattr(command, "commands", {}):
        command = command.commands[words[position]]
        position += 1
    assert not hasattr(command, "commands"), f"`{line}` names no command"
    known = {name for x in command.params for name in (*x.opts, *x.secondary_opts)}
    for word in words[position:]:
        if word.startswith("--"):
            assert word.partition("=")[0] in known, f"`{line}`: {word}"


def test_commands_are_found_at_all() -> None:
    assert "peftcli train recipe.yaml --dry-run" in COMMANDS
    assert {"scripts/quickstart", "scripts/check"} <= set(COMMANDS)


def test_every_command_of_the_program_is_listed() -> None:
    listed = set(re.findall(r"^`(peftcli [\w -]+)`: ", README, re.MULTILINE))
    command: Any = get_command(app)
    names = set()
    for name, inner in command.commands.items():
        names |= {f"peftcli {name} {x}" for x in getattr(inner, "commands", {})} or {
            f"peftcli {name}"
        }
    assert listed == names


def test_every_exit_code_is_told() -> None:
    part = README.partition("<!-- begin exit codes -->")[2].partition("<!-- end")[0]
    told = [int(code) for code in re.findall(r"^\| (\d+) \| \w", part, re.MULTILINE)]
    assert told == [code.value for code in ExitCode]
    for code in re.findall(r"exits with (\d+)", README):
        assert int(code) in told


def test_the_recipes_are_valid(tmp_path: Path) -> None:
    texts = [text for language, text in BLOCKS if language == "yaml" and "rnak" not in text]
    assert texts
    for text in texts:
        file = tmp_path / "recipe.yaml"
        file.write_text(text, encoding="utf-8")
        assert load_recipe(file).recipe.warnings() == []
        assert yaml.safe_load(text).keys() <= load_recipe(file).recipe.model_dump().keys()


def test_links_and_pictures_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", README)
    titles = re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    anchors = {"#" + title.lower().replace(" ", "-") for title in titles}
    local = [link for link in links if not link.startswith("https://")]
    assert len(local) > 50
    for link in local:
        assert link in anchors if link.startswith("#") else (ROOT / link).exists(), link


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_show_what_was_recorded(name: str) -> None:
    folder = ROOT / "scripts" / "assets"
    assert f"scripts/assets/{name}.svg" in README
    pieces = re.findall(r"<text [^>]*>([^<]*)</text>", (folder / f"{name}.svg").read_text("utf-8"))
    shown = "".join("".join(map(unescape, pieces)).split())
    recorded = Text.from_ansi((folder / f"{name}.ansi").read_text("utf-8")).plain
    for line in recorded.splitlines():
        assert "".join(line.split()) in shown, line


def test_the_run_folder_is_told_as_it_is() -> None:
    part = README.partition("## The run folder")[2].partition("\n## ")[0]
    for name in re.findall(r"^\| `([\w.]+)/?` ", part, re.MULTILINE):
        assert name in OWN_NAMES


def test_all_formats_and_methods_are_told() -> None:
    rows = set(re.findall(r"^\| `(\w+)` \| ", README, re.MULTILINE))
    assert set(FORMATS) <= rows
    for name, method in METHODS.items():
        assert f"| `{name}`: {method.summary} |" in README


def test_it_is_plain_text() -> None:
    assert README.isascii()
    assert "\t" not in README
    assert not re.search(r" +$", README, re.MULTILINE)
