"""An evaluation in the terminal: one table, the verdicts, the gates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from peftcli.evaluate.progress import Progressed, Tell
from peftcli.evaluate.result import Difference, Evaluation
from peftcli.evaluate.wording import (
    drop_text,
    figure,
    headlines,
    perplexity,
    size_text,
    spread,
)
from peftcli.events import Note, Warned
from peftcli.report import print_json

if TYPE_CHECKING:
    from rich.console import Console

COLOURS = {"better": "green", "worse": "red", "passed": "green", "regression": "red"}


@contextmanager
def telling(*, as_json: bool) -> Iterator[Tell]:
    """How an evaluation's events are shown: nothing beside JSON, lines, or one live line."""
    import sys

    if as_json:
        yield lambda event: None
        return
    from rich.console import Console
    from rich.status import Status

    console = Console(stderr=True, highlight=False)
    if not sys.stderr.isatty():
        yield lambda event: _plain(event, console)
        return
    with Status("reading rows", console=console) as status:

        def tell(event: Note | Warned | Progressed) -> None:
            if isinstance(event, Progressed):
                status.update(f"{event.what}  {event.done}/{event.total}")
            else:
                _plain(event, console)

        yield tell


def show(evaluation: Evaluation, *, as_json: bool) -> None:
    """The whole report, without the rows, on standard output."""
    if as_json:
        values = evaluation.to_dict()
        for key in ("table", "losses", "eval_losses", "recipe"):
            del values[key]
        print_json(values)
        return
    from rich.console import Console

    console = Console(highlight=False)
    _scores(evaluation, console)
    _latency(evaluation, console)
    for line in headlines(evaluation):
        console.print(line, markup=False)
    for text in _about_rows(evaluation):
        console.print(text, style="dim", markup=False)
    for gate in evaluation.gates:
        style = COLOURS.get(gate.outcome, "yellow")
        console.print(f"{gate.outcome}: {gate.name}: {gate.reason}", style=style, markup=False)
    if evaluation.written:
        console.print(" ".join(map(str, evaluation.written)), markup=False, soft_wrap=True)


def _plain(event: Note | Warned | Progressed, console: Console) -> None:
    if isinstance(event, Progressed):
        return
    warned = isinstance(event, Warned)
    text = f"warning: {event.text}" if warned else event.text
    console.print(text, style="yellow" if warned else None, markup=False)


def _scores(evaluation: Evaluation, console: Console) -> None:
    from rich.table import Table

    arms = [arm.name for arm in evaluation.arms]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("95 % intervals")
    table.add_column("rows", justify="right")
    for arm in arms:
        table.add_column(arm)
    table.add_column("change")
    changes = {(one.metric, one.second): one for one in evaluation.differences}
    for metric in dict.fromkeys(one.metric for one in evaluation.scores):
        found = {one.arm: one for one in evaluation.scores if one.metric == metric}
        cells = [
            f"{figure(metric, one.value)} ({spread(metric, one.low, one.high)})" if one else ""
            for one in map(found.get, arms)
        ]
        rows = max(one.rows for one in found.values())
        change = next((changes[metric, arm] for arm in arms if (metric, arm) in changes), None)
        table.add_row(metric, str(rows), *cells, _change(change))
        if metric == "loss":
            shown = [perplexity(found[arm].value) if arm in found else "" for arm in arms]
            table.add_row("perplexity", str(rows), *shown, "")
    console.print(table)


def _change(one: Difference | None) -> str:
    if one is None:
        return ""
    colour = COLOURS.get(one.verdict, "dim")
    if one.verdict not in COLOURS:
        return f"[{colour}]none measurable[/]"
    return f"[{colour}]{figure(one.metric, one.value, signed=True)} {one.verdict}[/]"


def _latency(evaluation: Evaluation, console: Console) -> None:
    if not evaluation.latency:
        return
    from rich.table import Table

    size = {arm.name: arm.weights_gib for arm in evaluation.arms}
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("cost", "batch", "first token", "tokens/s", "weights", "peak"):
        table.add_column(head, justify="left" if head == "cost" else "right")
    for one in evaluation.latency:
        table.add_row(
            one.arm,
            str(one.batch),
            f"{1000 * one.first_token_seconds:.1f} ms",
            f"{one.tokens_per_second:,.0f}",
            size_text(size.get(one.arm)),
            size_text(one.peak_gib),
        )
    console.print(table)


def _about_rows(evaluation: Evaluation) -> list[str]:
    rows, settings = evaluation.rows, evaluation.settings
    leaked = "leakage not checked" if rows.leaked is None else f"{rows.leaked} leaked rows left out"
    lines = [
        f"{rows.source}: {rows.held_out} rows, {rows.answered} scored, {leaked}, {rows.cut} cut; "
        f"greedy, at most {settings['max_new_tokens']} new tokens, seed {settings['seed']}"
    ]
    lines += [
        f"{one.rows} rows would show a drop in {one.metric} from "
        f"{drop_text(one)} on, in four of five evaluations"
        for one in evaluation.differences
        if one.metric == evaluation.primary and one.first == "base"
    ]
    return [*lines, *evaluation.notes]
