"""`peftcli estimate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftcli.cli.app import Json, Offline, Overrides, app
from peftcli.cli.importing import large_imports
from peftcli.errors import UsageError


@app.command()
def estimate(
    overrides: Overrides,
    recipe: Annotated[
        Path | None, typer.Argument(help="A YAML recipe.", show_default=False)
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="A GPU by name or memory: rtx-4090, h100, 24GB.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A model instead of a recipe, for instance llama-3.1-8b.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="The method, together with --model; qlora on 16-bit weights when absent."
        ),
    ] = None,
    price: Annotated[
        float | None, typer.Option(help="US dollars for an hour of the GPU: 1.99.")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Every method side by side.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Show each part's formula.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run two steps on this GPU and compare.")
    ] = False,
    offline: Offline = False,
    as_json: Json = False,
) -> None:
    """Tell memory, time and cost of a run before it starts. Reads no weights."""
    from peftcli.estimate.command import Choices, estimate_recipe, of_model

    if model and recipe is not None:
        raise UsageError(
            f"estimate: {recipe} and --model {model}: one of the two",
            f"leave one out; `--set model.name={model}` puts the model into the recipe",
        )
    if method and not model:
        raise UsageError(
            f"estimate: --method {method} goes with --model",
            f"`--set method={method}` puts the method into the recipe",
        )
    loaded = of_model(model, method, overrides, network=not offline) if model else None
    if loaded is None:
        if recipe is None:
            raise UsageError("estimate: no recipe", "name a YAML file, or --model NAME")
        from peftcli.recipe.load import load_recipe

        loaded = load_recipe(recipe, overrides)
    choices = Choices(gpu, price, compare, explain, as_json, offline)
    if measure:
        with large_imports():
            from peftcli.train.measure_command import measure_recipe

        measure_recipe(loaded, choices)
        return
    estimate_recipe(loaded, choices)
