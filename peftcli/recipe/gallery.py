"""The recipes that come with the program."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from peftcli.errors import UsageError

_INSTALLED = Path(__file__).parent.parent / "recipes"
_CHECKOUT = Path(__file__).parent.parent.parent / "recipes"


@dataclass(frozen=True)
class Entry:
    """One recipe: its name (`qwen3-8b/qlora`), its file, and the first line of its header."""

    name: str
    path: Path
    summary: str


def folder() -> Path:
    """Where the gallery lies, in an installation or in a checkout."""
    return _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT


def entries() -> list[Entry]:
    """Every recipe of the gallery, by name."""
    files = sorted(folder().rglob("*.yaml"))
    return [Entry(_name(file), file, _summary(file.read_text("utf-8"))) for file in files]


def read(name: str) -> str:
    """The text of one recipe; raises UsageError with the nearest names."""
    found = {entry.name: entry for entry in entries()}
    if name.removesuffix(".yaml") in found:
        return found[name.removesuffix(".yaml")].path.read_text("utf-8")
    near = get_close_matches(name, found, n=3, cutoff=0.4)
    guess = f"did you mean {' or '.join(near)}? " if near else ""
    raise UsageError(
        f"recipes: no recipe is called {name}", f"{guess}`peftcli recipes ls` lists all"
    )


def copy(name: str, target: Path) -> Path:
    """Write one recipe to `target`; an existing file is never replaced."""
    text = read(name)
    if target.is_dir():
        target = target / f"{name.replace('/', '-')}.yaml"
    try:
        with target.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise UsageError(f"recipes: {target} exists already", "name another file") from None
    except OSError as error:
        raise UsageError(f"recipes: {target} cannot be written: {error.strerror}") from None
    return target


def _name(file: Path) -> str:
    return str(file.relative_to(folder()).with_suffix(""))


def _summary(text: str) -> str:
    comments = [line.lstrip("# ").strip() for line in text.splitlines() if line.startswith("#")]
    return next((line for line in comments if line and "yaml-language-server" not in line), "")
