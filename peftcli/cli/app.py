"""The program's frame: one group of commands, and the only place that prints errors and exits."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from types import FrameType, TracebackType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.models import CommandInfo

from peftcli import __version__
from peftcli.errors import ExitCode, PeftcliError, disk_hint
from peftcli.privacy import go_offline, no_telemetry, redact


class _Group(TyperGroup):
    """Turns errors that a user can mend into one message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        sys.excepthook = _bug  # here, because Typer puts its own in place before this
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except PeftcliError as error:
            print(redact(f"error: {error.message}"), file=sys.stderr)
            if error.hint:
                print(redact(f"hint: {error.hint}"), file=sys.stderr)
            raise typer.Exit(error.exit_code) from None
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the end of the process writes once more
            place = error.filename or "standard output"
            text = f"error: {place}: {(error.strerror or str(error)).lower()}"
            print(redact(f"{text}\nhint: {disk_hint(error)}"), file=sys.stderr)
            raise typer.Exit(ExitCode.RESOURCES) from None
        except KeyboardInterrupt:
            raise _stopped() from None

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        try:
            return super().make_context(*arguments, **options)
        except KeyboardInterrupt:  # Typer itself would end with 1
            raise _stopped() from None


app = typer.Typer(
    cls=_Group,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Fine-tune a language model on one GPU from one YAML recipe.",
)

RecipeFile = Annotated[Path, typer.Argument(help="A YAML recipe.", show_default=False)]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a key of the recipe.",
        default_factory=list,
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def _offline(wanted: bool) -> bool:
    if wanted:  # before the libraries are imported, and for every process that is started
        go_offline()
    return wanted


Offline = Annotated[bool, typer.Option("--offline", help="Download nothing.", callback=_offline)]


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Fine-tune a language model on one GPU from one YAML recipe."""
    if show:
        print(f"peftcli {__version__}")
        raise typer.Exit(ExitCode.DONE)


def main() -> None:
    """The console script."""
    try:
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, _terminated)
        _run()
    except KeyboardInterrupt:  # before Typer began, or after it ended
        sys.exit(_stopped().exit_code)


def _run() -> None:
    no_telemetry()
    alone(sys.argv[1:2])()


def alone(named: Sequence[str]) -> typer.Typer:
    """The program with the named command only: Typer builds every command that it is given."""
    one = copy(app)
    one.registered_commands = [info for info in app.registered_commands if _name(info) in named]
    one.registered_groups = [info for info in app.registered_groups if info.name in named]
    return one if one.registered_commands or one.registered_groups else app


def _name(info: CommandInfo) -> str | None:
    return info.name or (info.callback.__name__ if info.callback else None)


def _stopped() -> typer.Exit:
    print("\nstopped; nothing half-written is left", file=sys.stderr)
    return typer.Exit(ExitCode.INTERRUPTED)


def _bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A traceback without the tokens that an error's text may hold."""
    print(redact("".join(traceback.format_exception(kind, error, trace))), file=sys.stderr, end="")


def _terminated(number: int, frame: FrameType | None) -> None:
    """End as Ctrl-C does; a run has a handler of its own."""
    raise KeyboardInterrupt
