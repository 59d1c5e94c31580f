"""Results -> the terminal or JSON. Nothing else prints, apart from errors in `cli.py`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftcli.events import Evaluated, Event, Listener, Preparing, Saved, Step, Warned
from peftcli.words import counted

if TYPE_CHECKING:
    from rich.progress import Progress

    from peftcli.recipe.gallery import Entry
    from peftcli.train.dry_run import DryRun
    from peftcli.train.run import TrainResult

PLAIN_SECONDS = 5.0  # seconds between plain progress lines


def print_json(value: Any) -> None:
    """One JSON document on one line of standard output; paths are text."""
    print(json.dumps(value, ensure_ascii=False, default=str))


@contextmanager
def training(*, quiet: bool, as_json: bool, passing: bool = False) -> Iterator[Listener]:
    """How a run's events are shown: JSON lines, warnings only, plain lines, or a live bar.

    A `passing` bar is gone when it has ended.
    """
    if as_json:
        yield _json_line
    elif quiet:
        yield _warnings_only
    elif not sys.stdout.isatty():
        yield _PlainLines()
    else:
        with _progress(passing) as progress:
            yield _LiveBar(progress)


@contextmanager
def preparing(*, as_json: bool) -> Iterator[Listener]:
    """How far the rows are, where that is all there is to follow."""
    with training(quiet=as_json, as_json=False, passing=True) as tell:
        yield lambda event: tell(event) if isinstance(event, Preparing) else None


def show_training(result: TrainResult, *, quiet: bool, as_json: bool) -> None:
    """The end of a run: losses, speed, memory, and what to do next."""
    if as_json:
        print(json.dumps({"event": "result", **asdict(result)}, default=str))
        return
    if quiet:
        return
    best = ""
    if result.best_eval_loss is not None:
        best = f", best held-out loss {result.best_eval_loss:.4f}"
        best += f" at step {result.best_step}" if result.best_step else ""
    print(
        f"done: {counted(result.steps, 'step')} in {duration(result.seconds)}, "
        f"loss {result.final_loss:.4f}{best}\n"
        f"      {result.tokens_per_second:,.0f} tokens/s, peak {result.peak_memory_gib:.2f} GiB, "
        f"{result.trainable_parameters:,} trained parameters\n"
        f"      {result.result}"
    )


def show_dry_run(result: DryRun, *, as_json: bool) -> None:
    """The resolved recipe, the rows, three rendered rows with their labels, and the plan."""
    if as_json:
        print_json(asdict(result))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    console.print("[bold]recipe[/] (every value, and where it comes from)")
    for key, value, origin in result.values:
        console.print(Text(f"  {key}: {value}").append(f"  # {origin}", style="dim"))
    console.print("\n[bold]rows[/]")
    for line in result.rows:
        console.print(Text(f"  {line}"))
    for number, pieces in enumerate(result.samples, 1):
        legend = "[green]trained[/], [dim]masked[/]" if console.is_terminal else ">>>trained<<<"
        console.print(f"\n[bold]row {number}[/] ({legend})")
        text = Text()
        for piece, trained in pieces:
            text.append(piece, style="green" if trained else "dim")
        console.print(text if console.is_terminal else Text(_marked(pieces)))
    console.print("\n[bold]plan[/]")
    for line in result.plan:
        console.print(Text(f"  {line}"))


def show_gallery(entries: Sequence[Entry], *, as_json: bool) -> None:
    """Names and summaries of the gallery."""
    if as_json:
        print_json([asdict(entry) for entry in entries])
        return
    width = max((len(entry.name) for entry in entries), default=0)
    for entry in entries:
        print(f"{entry.name:{width}}  {entry.summary}")


def duration(seconds: float) -> str:
    """Seconds as a person says them: 4.2 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def step_line(step: Step) -> str:
    """One step as one plain line."""
    norm = "" if step.grad_norm is None else f"  norm {step.grad_norm:.2f}"
    return (
        f"step {step.step}/{step.total_steps}  loss {step.loss:.4f}  lr {step.learning_rate:.2e}"
        f"{norm}  {step.tokens_per_second:,.0f} tokens/s  {step.memory_gib:.2f} GiB  "
        f"{duration(step.remaining_seconds)} left"
    )


def _event_line(event: Event) -> str:
    if isinstance(event, Step):
        return step_line(event)
    if isinstance(event, Evaluated):
        best = "  (best so far)" if event.best else ""
        return (
            f"held out after step {event.step}: loss {event.loss:.4f}  "
            f"perplexity {event.perplexity:.2f}{best}"
        )
    if isinstance(event, Saved):
        return f"saved {event.path.name}"
    if isinstance(event, Preparing):
        return f"preparing: {event.share:.0%}, {event.rows:,} rows"
    return f"warning: {event.text}" if isinstance(event, Warned) else event.text


def _json_line(event: Event) -> None:
    name = type(event).__name__.lower()
    values = {key: _jsonable(value) for key, value in asdict(event).items()}
    print(json.dumps({"event": name, **values}), flush=True)


def _jsonable(value: Any) -> Any:
    if isinstance(value, float) and value != value:
        return None
    return str(value) if isinstance(value, Path) else value


def _warnings_only(event: Event) -> None:
    if isinstance(event, Warned):
        print(_event_line(event), file=sys.stderr, flush=True)


class _PlainLines:
    """For logs: the first and last step, and one line every few seconds."""

    def __init__(self) -> None:
        self._last = 0.0

    def __call__(self, event: Event) -> None:
        if isinstance(event, Step | Preparing):
            now = time.monotonic()
            edge = isinstance(event, Step) and event.step in (1, event.total_steps)
            if not edge and now - self._last < PLAIN_SECONDS:
                return
            self._last = now
        if isinstance(event, Saved):
            return
        stream = sys.stderr if isinstance(event, Warned) else sys.stdout
        print(_event_line(event), file=stream, flush=True)


class _LiveBar:
    """For people: a bar with the newest numbers, everything else above it."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("preparing", total=None, numbers="")

    def __call__(self, event: Event) -> None:
        if isinstance(event, Step):
            _, _, numbers = step_line(event).partition("  ")
            self._progress.update(
                self._task,
                description=f"step {event.step}/{event.total_steps}",
                completed=event.step,
                total=event.total_steps,
                numbers=numbers,
            )
        elif isinstance(event, Preparing):
            numbers = f"{event.share:.0%}  {event.rows:,} rows"
            self._progress.update(self._task, completed=event.share, total=1, numbers=numbers)
        elif not isinstance(event, Saved):
            style = "yellow" if isinstance(event, Warned) else None
            style = "green" if isinstance(event, Evaluated) and event.best else style
            self._progress.console.print(_event_line(event), style=style, highlight=False)


def _progress(passing: bool) -> Progress:
    from rich.progress import BarColumn, Progress, TextColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[numbers]}"),
        transient=passing,
    )


def _marked(pieces: Sequence[tuple[str, bool]]) -> str:
    """Without colours, trained text stands between marks."""
    return "".join(f">>>{piece}<<<" if trained else piece for piece, trained in pieces)
