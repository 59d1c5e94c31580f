"""YAML file and `--set` overrides -> Recipe, with every problem's place."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from peftcli.errors import RecipeError, unreadable
from peftcli.recipe.document import (
    MAX_BYTES,
    SET,
    Document,
    Path,
    overridden,
    read_document,
)
from peftcli.recipe.problems import place_of, problem_lines, problems_of, without
from peftcli.recipe.schema import Recipe
from peftcli.recipe.tokens import refuse_secrets

ROUNDS = 6  # keys, rules within sections, rules between them; each may uncover the next


@dataclass(frozen=True, eq=False)
class LoadedRecipe:
    """A valid recipe, and where each of its values comes from."""

    recipe: Recipe
    document: Document

    def origin(self, path: Path) -> str:
        """`FILE:LINE:COLUMN`, `--set ...`, or `default` for a value nobody wrote."""
        values = self.document.values
        for depth, part in enumerate(path):
            if isinstance(values, dict) and part in values:
                values = values[part]
            elif isinstance(values, dict) or part != "name":  # `method: lora` writes its name only
                return "default"
            else:
                return self.document.place(path[:depth])
        return self.document.place(path)


def load_recipe(path: FilePath, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read and validate a recipe; `overrides` are `key.key=value` strings.

    Raises RecipeError whose message holds one line for each problem.
    """
    return validate(read_document(_text(path), str(path)), overrides)


def validate(written: Document, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """The document, with what `--set` changes, as a recipe.

    Raises RecipeError with one line for each problem.
    """
    document = overridden(written, overrides)
    refuse_secrets(document)
    judged = _judged(document)
    if isinstance(judged, Recipe) and not document.problems:
        return LoadedRecipe(judged, document)
    problems = {} if isinstance(judged, Recipe) else judged
    own = {path for path in problems if not place_of(path, document).startswith(SET)}
    told = _with_causes(problems, own, written, overrides)
    raise _refusal(document, problem_lines(told, document))


def _judged(document: Document) -> Recipe | dict[Path, str]:
    """The recipe, or each wrong key with its sentence."""
    problems: dict[Path, str] = {}
    values = document.values
    for _ in range(ROUNDS):
        try:
            recipe = Recipe.model_validate(values)
            return problems or recipe
        except ValidationError as error:
            found = problems_of(error, document, values)
            fresh = {
                path: text
                for path, text in found.items()
                if path not in problems and not _names_one(text, problems)
            }
            problems = fresh | problems
            # Rules between keys are judged only where every key is right, so look at the rest.
            values = without(values, found)
            if not fresh:
                break
    return problems


def _with_causes(
    problems: dict[Path, str], own: set[Path], written: Document, overrides: Sequence[str]
) -> dict[Path, str]:
    """The sentences; of those in the file's `own` lines, with each `--set` that they come from."""
    causes: dict[Path, list[str]] = {}
    for index, override in enumerate(overrides):
        try:
            others = overridden(written, [*overrides[:index], *overrides[index + 1 :]])
        except RecipeError:  # another one needs it
            continue
        judged = _judged(others)
        before = {} if isinstance(judged, Recipe) else judged
        for path, text in problems.items():
            if path in own and before.get(path) != text:
                causes.setdefault(path, []).append(f"{SET}{override}")
    return {
        path: f"{text} (because of {' and '.join(causes[path])})" if path in causes else text
        for path, text in problems.items()
    }


def _names_one(text: str, problems: dict[Path, str]) -> bool:
    """Whether a sentence speaks of a key that is wrong itself: its default stands in for it."""
    return any(re.search(rf"\b{re.escape(str(path[-1]))}\b", text) for path in problems if path)


def resolved(recipe: Recipe) -> dict[str, Any]:
    """Every value of the run as plain data, the method's own defaults filled in."""
    values = recipe.model_dump(mode="json")
    values["training"]["learning_rate"] = recipe.learning_rate
    values["training"]["optimizer"] = recipe.optimizer
    return values


def recipe_text(recipe: Recipe) -> str:
    """The recipe as YAML with every value written out; reading it gives the same run."""
    text: str = yaml.safe_dump(resolved(recipe), sort_keys=False, allow_unicode=True)
    return text


def leaves(values: BaseModel | dict[str, Any]) -> list[tuple[Path, Any]]:
    """The values of a recipe in order, each with its path; lists count as one value."""
    plain = values.model_dump(mode="json") if isinstance(values, BaseModel) else values
    found: list[tuple[Path, Any]] = []
    for key, value in plain.items():
        if isinstance(value, dict) and value:
            found.extend(((key, *path), leaf) for path, leaf in leaves(value))
        else:
            found.append(((key,), value))
    return found


def _refusal(document: Document, lines: list[str]) -> RecipeError:
    lines = [*document.problems, *lines]
    count = f"{len(lines)} problems" if len(lines) > 1 else "1 problem"
    return RecipeError(
        "\n".join(lines), f"{count} in {document.name}; `peftcli schema` lists every key"
    )


def _text(path: FilePath) -> str:
    try:
        with path.open("rb") as stream:  # a recipe can be a device that never ends
            return stream.read(MAX_BYTES + 1).decode("utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(
            f"{path}: no such recipe", "write one, or list the gallery: peftcli recipes ls"
        ) from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: a folder, not a recipe", "name the YAML file in it") from None
    except UnicodeDecodeError as error:
        if len(error.object) > MAX_BYTES:
            raise RecipeError(
                f"{path}: larger than {MAX_BYTES:,} bytes; a recipe is a short file"
            ) from None
        raise RecipeError(f"{path}: not UTF-8 at byte {error.start}", "save it as UTF-8") from None
    except OSError as error:
        raise unreadable(str(path), error, RecipeError) from None
