"""`peftcli eval` and `peftcli chat`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peftcli.cli.app import Json, Offline, app
from peftcli.cli.importing import large_imports

if TYPE_CHECKING:
    from peftcli.evaluate.options import EvalOptions

Source = Annotated[
    Path, typer.Argument(help="A run folder, recipe, adapter or model.", show_default=False)
]
Device = Annotated[str, typer.Option(help="auto, cuda or cpu, where no recipe says it.")]
BaseModel = Annotated[
    str | None, typer.Option(help="The base, where the adapter's own record is wrong.")
]
Texts = list[str] | None


@app.command("eval")
def evaluate(
    source: Source,
    data: Annotated[Texts, typer.Option(help="Rows to ask instead of the held-out ones.")] = None,
    metric: Annotated[Texts, typer.Option(help="A score; chosen by content if absent.")] = None,
    metric_function: Annotated[
        str | None, typer.Option(metavar="MODULE:FUNCTION", help="Your own score; runs its code.")
    ] = None,
    retain: Annotated[
        Texts, typer.Option(help="Text that should not be forgotten; `none` for none.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAME,NAME", help="Tasks of lm-evaluation-harness.")
    ] = None,
    task_limit: Annotated[int | None, typer.Option(help="Documents of each task.")] = None,
    fail_under: Annotated[
        Texts, typer.Option(metavar="METRIC=LIMIT", help="The least score; exit 10 below.")
    ] = None,
    min_gain: Annotated[
        str | None, typer.Option(help="The least gain over the base; 0 means no regression.")
    ] = None,
    max_forgetting: Annotated[
        str | None, typer.Option(help="How much the loss on general text may rise: 2%.")
    ] = None,
    max_merge_drift: Annotated[
        str | None, typer.Option(help="How much merging may change the loss: 0.1%.")
    ] = None,
    require_proof: Annotated[
        bool, typer.Option("--require-proof", help="Exit 11 for what the rows leave open.")
    ] = False,
    against: Annotated[Path | None, typer.Option(help="An earlier eval.json to beat.")] = None,
    limit: Annotated[int, typer.Option(help="Rows whose answers are scored; 0 for all.")] = 500,
    max_new_tokens: Annotated[int | None, typer.Option(help="The longest answer.")] = None,
    max_cut: Annotated[
        str, typer.Option(help="The share of rows that may be left out as cut.")
    ] = "5%",
    latency: Annotated[bool, typer.Option(help="Measure speed too.")] = True,
    base_model: BaseModel = None,
    device: Device = "auto",
    output: Annotated[Path | None, typer.Option(help="Where the report goes.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure everything again.")] = False,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Compare base, adapter and merged model on the same rows; fail on a regression."""
    from peftcli.evaluate.check import check
    from peftcli.evaluate.options import EvalOptions, Gates, read_limits, read_share

    def share(text: str | None, option: str) -> float | None:
        return None if text is None else read_share(text, option)

    options = EvalOptions(
        data=tuple(data or ()),
        base_model=base_model,
        metrics=tuple(metric or ()),
        metric_function=metric_function,
        retain=None if retain is None else tuple(path for path in retain if path != "none"),
        tasks=tuple(tasks.split(",")) if tasks else (),
        task_limit=task_limit,
        gates=Gates(
            fail_under=read_limits(fail_under or ()),
            min_gain=share(min_gain, "--min-gain"),
            max_forgetting=share(max_forgetting, "--max-forgetting"),
            max_merge_drift=share(max_merge_drift, "--max-merge-drift"),
            require_proof=require_proof,
        ),
        against=against,
        limit=limit or None,
        max_new_tokens=max_new_tokens,
        max_cut=read_share(max_cut, "--max-cut"),
        latency=latency,
        device=device,
        output=output,
        fresh=fresh,
        offline=offline,
    )
    check(source, options)
    judged(source, options, as_json=as_json)


def judged(source: Path, options: EvalOptions, *, as_json: bool) -> None:
    """Evaluate, show the report, and raise for broken gates."""
    from peftcli.evaluate.gates import enforce

    with large_imports():
        from peftcli.evaluate.run import run
    from peftcli.evaluate.show import show, telling

    with telling(as_json=as_json) as tell:
        evaluation = run(source, options, tell)
    show(evaluation, as_json=as_json)
    enforce(evaluation)


@app.command()
def chat(
    source: Source,
    prompt: Annotated[str | None, typer.Option(help="One question instead of a talk.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Start with the adapter off.")] = False,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of sampled answers.")] = 0,
    base_model: BaseModel = None,
    device: Device = "auto",
    offline: Offline = False,
) -> None:
    """Talk to a tuned model with its own template and stops."""
    with large_imports():
        from peftcli.evaluate.chat import ChatOptions, open_chat, talk

    options = ChatOptions(
        base=base,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        base_model=base_model,
        device=device,
        offline=offline,
    )
    opened = open_chat(source, options)

    def write(text: str) -> None:
        print(text, end="", flush=True)

    if prompt is not None:
        opened.say(prompt, write)
        print()
        return

    def read() -> str | None:
        print("> ", end="", flush=True)
        return sys.stdin.readline() or None

    talk(opened, read, write)
