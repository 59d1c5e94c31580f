"""`peftcli train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peftcli.cli.app import Json, Offline, Overrides, RecipeFile, app
from peftcli.cli.importing import large_imports

if TYPE_CHECKING:
    from peftcli.recipe.load import LoadedRecipe


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
        bool, typer.Option("--force", help="Go on though something changed, or cannot fit.")
    ] = False,
    offline: Offline = False,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPOSITORY", help="Upload the result when done.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print warnings and errors only.")] = False,
    as_json: Json = False,
) -> None:
    """Tune a model as the recipe says."""
    from peftcli.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    # Only now, because a wrong recipe is answered sooner without these imports.
    from peftcli import report

    _check(loaded)
    with large_imports():
        from peftcli.train.dry_run import dry_run as preview
        from peftcli.train.run import Options, run

    if dry_run:
        with report.preparing(as_json=as_json) as tell:
            shown = preview(loaded, tell, offline=offline)
        report.show_dry_run(shown, as_json=as_json)
        return
    options = Options(
        resume=resume, overwrite=overwrite, force=force, offline=offline, push_to_hub=push_to_hub
    )
    with report.training(quiet=quiet, as_json=as_json) as tell:
        result = run(loaded, options, tell)
    report.show_training(result, quiet=quiet, as_json=as_json)
    if loaded.recipe.evaluation.gates is not None:
        from peftcli.cli.evaluate import judged
        from peftcli.evaluate.options import EvalOptions

        judged(result.output, EvalOptions(latency=False, offline=offline), as_json=as_json)


def _check(loaded: LoadedRecipe) -> None:
    """Refuse what the data and the model's shape rule out, before torch is imported."""
    from peftcli.data.sources import check_exist
    from peftcli.estimate.find import known_architecture
    from peftcli.recipe.checks import check_architecture

    check_exist(loaded.recipe.data.paths(), Path.cwd())
    architecture = known_architecture(loaded.recipe.model.name)
    if architecture is not None:
        check_architecture(loaded, architecture)
