"""What `peftcli estimate` does with its arguments."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from peftcli.errors import ResourceError
from peftcli.estimate.find import find_architecture
from peftcli.estimate.gpus import GPUS, Gpu, find_gpu
from peftcli.estimate.result import Estimate
from peftcli.estimate.rows import count_rows
from peftcli.estimate.run import run
from peftcli.estimate.show import show_estimate, show_estimates
from peftcli.methods import METHODS
from peftcli.recipe.checks import check_architecture
from peftcli.recipe.document import Document, override
from peftcli.recipe.load import LoadedRecipe, validate


def of_model(model: str, method: str, overrides: Sequence[str]) -> LoadedRecipe:
    """A recipe of defaults for a model that was named on the command line."""
    values = {"model": model, "method": method, "data": {"train": "rows.jsonl"}, "output": "run"}
    document = Document("--model", values)
    for text in overrides:
        override(document, text)
    return validate(document)


def estimate_recipe(
    loaded: LoadedRecipe, *, gpu: str | None, compare: bool, explain: bool, as_json: bool
) -> None:
    """Print the estimate; raises ResourceError when a named GPU cannot hold the run."""
    architecture = find_architecture(loaded.recipe.model.name)
    check_architecture(loaded, architecture)
    rows = count_rows(loaded.recipe.data, Path.cwd())

    def on(card: Gpu, other: LoadedRecipe = loaded) -> Estimate:
        return run(other.recipe, card, rows=rows, architecture=architecture)

    if compare:
        card = find_gpu(gpu or "H100")
        _several([(name, on(card, _with_method(loaded, name))) for name in METHODS], card, as_json)
        return
    if gpu is None:
        found = [(card.name, on(card)) for card in GPUS]
        found.sort(key=lambda item: (item[1].verdict != "fits", item[1].memory.available_gib))
        _several(found, None, as_json)
        return
    estimate = on(find_gpu(gpu))
    if as_json:
        print(json.dumps(asdict(estimate), indent=2))
    else:
        show_estimate(estimate, explain=explain)
    if estimate.verdict == "does not fit":
        memory = estimate.memory
        raise ResourceError(
            f"{estimate.gpu} cannot hold this run: it needs about {memory.needed_gib:.1f} GiB of "
            f"{memory.available_gib:.1f} GiB",
            "make one of the changes above, or name a larger --gpu",
        )


def _several(found: list[tuple[str, Estimate]], card: Gpu | None, as_json: bool) -> None:
    if as_json:
        print(json.dumps({name: asdict(estimate) for name, estimate in found}, indent=2))
    else:
        show_estimates(found, f"method on {card.name}" if card else "GPU")


def _with_method(loaded: LoadedRecipe, name: str) -> LoadedRecipe:
    """The same recipe by another method, with that method's own defaults."""
    if loaded.recipe.method.name == name:
        return loaded
    method = METHODS[name](name=name)  # type: ignore[call-arg]
    recipe = loaded.recipe.model_copy(update={"method": method})
    return LoadedRecipe(recipe, loaded.document)
