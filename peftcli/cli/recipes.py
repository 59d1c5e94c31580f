"""`peftcli schema` and `peftcli recipes`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftcli.cli.app import Json, app

gallery_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The recipe gallery.")
app.add_typer(gallery_app, name="recipes")


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
