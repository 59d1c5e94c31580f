"""Which linear modules a recipe's target_modules means, matched as PEFT matches them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from peftcli.architecture.shapes import Architecture, Linear
from peftcli.errors import RecipeError

ALL_LINEAR = "all-linear"


def linear_shapes(
    architecture: Architecture,
    target_modules: str | Sequence[str],
    layers_to_transform: int | Collection[int] | None = None,
) -> list[Linear]:
    """The targeted modules as groups, their `layers` cut down to those that match.

    `target_modules` is "all-linear" (all but the output head), names that match a whole path or
    its end, or one regular expression for the whole path. Empty where nothing matches.
    Raises RecipeError where the expression is not valid.
    """
    matches = _matcher(target_modules)
    wanted = _wanted(layers_to_transform)
    everything = _is_all_linear(target_modules)
    found = []
    for linear in architecture.linears:
        if everything and linear.kind == "head":
            continue
        if everything and wanted is None:
            found.append(linear)
            continue
        kept = [
            layer
            for path, layer in linear.paths()
            if matches(path) and (wanted is None or layer in wanted)
        ]
        if kept:
            layers = tuple(layer for layer in kept if layer is not None)
            found.append(replace(linear, layers=layers))
    return found


def _is_all_linear(target_modules: str | Sequence[str]) -> bool:
    return isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR


def _wanted(layers: int | Collection[int] | None) -> frozenset[int] | None:
    if layers is None:
        return None
    chosen = frozenset((layers,) if isinstance(layers, int) else layers)
    return chosen or None  # PEFT takes an empty list as no restriction


def _matcher(target_modules: str | Sequence[str]) -> Callable[[str], bool]:
    if _is_all_linear(target_modules):
        return lambda path: True
    if isinstance(target_modules, str):
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise RecipeError(
                f"target_modules: {target_modules!r} is no regular expression: {error}",
                "Write a list of module names, or mend the expression.",
            ) from error
        return lambda path: pattern.fullmatch(path) is not None
    ends = tuple(f".{name}" for name in target_modules)
    names = frozenset(target_modules)
    return lambda path: path in names or path.endswith(ends)
