"""The commands: parse, call `run()`, hand the result to `report`. The only place that exits."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from peftcli import __version__
from peftcli.errors import ExitCode, PeftcliError, UsageError


class _Group(TyperGroup):
    """Turns errors that a user can mend into one message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PeftcliError as error:
            print(f"error: {error.message}", file=sys.stderr)
            if error.hint:
                print(f"hint: {error.hint}", file=sys.stderr)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            print("\nstopped; nothing half-written is left", file=sys.stderr)
            raise typer.Exit(ExitCode.INTERRUPTED) from None


app = typer.Typer(
    cls=_Group,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Fine-tune a language model on one GPU from one YAML recipe.",
)
gallery_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The recipe gallery.")
app.add_typer(gallery_app, name="recipes")

RecipeFile = Annotated[Path, typer.Argument(help="A YAML recipe.", show_default=False)]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a key of the recipe.", default_factory=list
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Fine-tune a language model on one GPU from one YAML recipe."""
    if show:
        print(f"peftcli {__version__}")
        raise typer.Exit(ExitCode.DONE)


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show rows, labels and plan; train nothing.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in the output folder.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Resume although something changed.")
    ] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Download nothing.")] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPOSITORY", help="Upload the result when done.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print warnings and errors only.")] = False,
    as_json: Json = False,
) -> None:
    """Tune a model as the recipe says."""
    from peftcli import report
    from peftcli.data.sources import check_exist
    from peftcli.estimate.find import known_architecture
    from peftcli.recipe.checks import check_architecture
    from peftcli.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    check_exist(loaded.recipe.data.paths(), Path.cwd())
    architecture = known_architecture(loaded.recipe.model.name)
    if architecture is not None:
        check_architecture(loaded, architecture)
    from peftcli.train.dry_run import dry_run as preview
    from peftcli.train.run import Options, run

    if dry_run:
        report.show_dry_run(preview(loaded, offline=offline), loaded, as_json=as_json)
        return
    options = Options(
        resume=resume, overwrite=overwrite, force=force, offline=offline, push_to_hub=push_to_hub
    )
    with report.training(quiet=quiet, as_json=as_json) as tell:
        result = run(loaded, options, tell)
    report.show_training(result, quiet=quiet, as_json=as_json)


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
    method: Annotated[str, typer.Option(help="The method, together with --model.")] = "qlora",
    compare: Annotated[bool, typer.Option("--compare", help="Every method side by side.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Show each part's formula.")] = False,
    as_json: Json = False,
) -> None:
    """Tell memory, time and cost of a run before it starts. Reads no weights."""
    from peftcli.estimate.command import estimate_recipe, of_model

    loaded = of_model(model, method, overrides) if model else None
    if loaded is None:
        if recipe is None:
            raise UsageError("estimate: no recipe", "name a YAML file, or --model NAME")
        from peftcli.recipe.load import load_recipe

        loaded = load_recipe(recipe, overrides)
    estimate_recipe(loaded, gpu=gpu, compare=compare, explain=explain, as_json=as_json)


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from peftcli.recipe.reference import json_schema

    print(json_schema())


@gallery_app.command("ls")
def gallery_list(as_json: Json = False) -> None:
    """List the recipes of the gallery."""
    from peftcli import report
    from peftcli.recipe.gallery import entries

    report.show_gallery(entries(), as_json=as_json)


@gallery_app.command("show")
def gallery_show(name: Annotated[str, typer.Argument(help="A name from `recipes ls`.")]) -> None:
    """Print one recipe of the gallery."""
    from peftcli.recipe.gallery import read

    print(read(name), end="")


@gallery_app.command("copy")
def gallery_copy(
    name: Annotated[str, typer.Argument(help="A name from `recipes ls`.")],
    target: Annotated[Path, typer.Argument(help="The file to write.")] = Path("recipe.yaml"),
) -> None:
    """Copy one recipe of the gallery to a file of yours."""
    from peftcli.recipe.gallery import copy

    print(copy(name, target))


def main() -> None:
    """The console script."""
    # It complains on import about an optional kernel that is not needed.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    app()
