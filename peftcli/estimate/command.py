"""What `peftcli estimate` does with its arguments."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from peftcli.architecture.config import Architecture
from peftcli.architecture.others import refuse_hybrids
from peftcli.errors import ArtefactError, ResourceError, UsageError
from peftcli.estimate.find import find_architecture
from peftcli.estimate.gpus import GPUS, Gpu, find_gpu
from peftcli.estimate.result import Estimate, Rows
from peftcli.estimate.run import run
from peftcli.methods import VARIANTS, changed
from peftcli.methods.qlora import Qlora
from peftcli.recipe.checks import check_architecture, method_problems, stored_problems
from peftcli.recipe.document import Document
from peftcli.recipe.load import LoadedRecipe, validate
from peftcli.recipe.schema import Recipe

UNREAD = "rows.jsonl"  # stands for the rows that --model has not


@dataclass(frozen=True, eq=False)
class Choices:
    """The options of the command line."""

    gpu: str | None = None
    price: float | None = None
    compare: bool = False
    explain: bool = False
    as_json: bool = False
    offline: bool = False


@dataclass(frozen=True, eq=False)
class Subject:
    """What is estimated."""

    loaded: LoadedRecipe
    architecture: Architecture
    rows: Rows
    price: float | None

    def on(self, gpu: Gpu, recipe: Recipe | None = None, *, brief: bool = False) -> Estimate:
        """The estimate on a GPU, of this recipe or of a variant of it as it is."""
        return run(
            recipe or self.loaded.recipe,
            gpu,
            rows=self.rows,
            architecture=self.architecture,
            price=self.price,
            never_advise=recipe is not None,
            brief=brief,
        )


def of_model(
    model: str, method: str | None, overrides: Sequence[str], *, network: bool
) -> LoadedRecipe:
    """A recipe of defaults for a model that was named on the command line.

    Without a method QLoRA, or LoRA on a checkpoint that is quantised already.
    """
    if method is None:
        method = "qlora"
        with suppress(ArtefactError, UsageError):  # which is told when the model is read
            found = find_architecture(model, network=network)
            method = "lora" if stored_problems(Qlora(), found) else method
    values = {"model": model, "method": method, "data": {"train": UNREAD}, "output": "run"}
    return validate(Document("--model", values), overrides)


def subject_of(loaded: LoadedRecipe, choices: Choices) -> Subject:
    """The recipe with its model's architecture and what is known of its rows."""
    price = choices.price
    if price is not None and not (math.isfinite(price) and 0 <= price < 10_000):
        raise UsageError(f"--price {price:g}: not a price", "write US dollars for one hour: 1.99")
    model = loaded.recipe.model
    try:
        found = find_architecture(model.name, model.revision, network=not choices.offline)
        refuse_hybrids(found, model.name)
    except ArtefactError as error:  # here the file is the question, not a thing to be trusted
        raise UsageError(error.message, error.hint) from None
    check_architecture(_able(loaded, found) if choices.compare else loaded, found)
    return Subject(loaded, found, _rows(loaded), price)


def _able(loaded: LoadedRecipe, architecture: Architecture) -> LoadedRecipe:
    """The recipe by a method that works on the model, where only the method itself does not."""
    recipe = loaded.recipe
    wrong = {keys for keys, _ in method_problems(recipe.method, architecture)}
    if not wrong <= {("method", "name"), ("method", "quantization")}:
        return loaded
    methods = [recipe.method, *(other.method for other in variants(recipe).values())]
    able = (method for method in methods if not method_problems(method, architecture))
    method = next(able, recipe.method)
    return replace(loaded, recipe=recipe.model_copy(update={"method": method}))


def estimate_recipe(loaded: LoadedRecipe, choices: Choices) -> None:
    """Print the estimate; raises ResourceError when a named GPU cannot hold the run."""
    subject = subject_of(loaded, choices)
    if choices.compare:
        _compare(subject, choices)
        return
    if choices.gpu is None:
        _every_gpu(subject, as_json=choices.as_json)
        return
    estimate = subject.on(find_gpu(choices.gpu))
    if choices.as_json:
        print(json.dumps(asdict(estimate), indent=2))
    else:
        from peftcli.estimate.show import show_estimate

        show_estimate(estimate, explain=choices.explain)
    if estimate.refusal:
        raise ResourceError(estimate.refusal, "name another --gpu, or leave that key out")
    if not estimate.holds:
        memory = estimate.memory
        raise ResourceError(
            f"{estimate.gpu} cannot hold this run: it needs about {memory.needed_gib:.1f} GiB of "
            f"{memory.available_gib:.1f} GiB",
            _way_out(estimate),
        )


def _way_out(estimate: Estimate) -> str:
    """What is left to a run that does not fit."""
    if estimate.paste:
        return "make the changes above, or name a larger --gpu"
    if estimate.other_gpus:
        return "name a larger --gpu; no change of the recipe is enough"
    return (
        "no change of the recipe is enough, and no card of the table either: take a smaller model"
    )


def variants(recipe: Recipe) -> dict[str, Recipe]:
    """The recipe by each method, with the keys that the methods share, one micro-batch for all."""
    training = recipe.training
    micro = 1 if training.micro_batch_size == "auto" else training.micro_batch_size
    mode = "full" if training.checkpointing == "auto" else training.checkpointing
    even = training.model_copy(update={"micro_batch_size": micro, "checkpointing": mode})
    found = {}
    for name, keys in VARIANTS.items():
        with suppress(ValidationError):  # keys of the recipe's method that do not go with these
            method = changed(recipe.method, keys)
            found[name] = recipe.model_copy(update={"method": method, "training": even})
    return found


def _compare(subject: Subject, choices: Choices) -> None:
    card = find_gpu(choices.gpu or "H100")
    found, cards = [], {}
    for name, recipe in variants(subject.loaded.recipe).items():
        if method_problems(recipe.method, subject.architecture):
            continue
        found.append((name, subject.on(card, recipe)))
        fitting = (gpu for gpu in by_price() if subject.on(gpu, recipe).verdict == "fits")
        cards[name] = next(fitting, None)
    if choices.as_json:
        values = {
            name: asdict(estimate) | {"cheapest_gpu": gpu.name if (gpu := cards[name]) else None}
            for name, estimate in found
        }
        print(json.dumps(values, indent=2))
        return
    from peftcli.estimate.show import show_methods

    show_methods(found, card, cards)


def by_price() -> list[Gpu]:
    """Cards to rent, the cheapest first; then those that one owns, the smallest first."""
    return sorted(GPUS, key=lambda gpu: (gpu.price_per_hour_usd or (99.0, 99.0), gpu.memory))


def _every_gpu(subject: Subject, *, as_json: bool) -> None:
    found = [subject.on(gpu, brief=not as_json) for gpu in GPUS]
    found.sort(key=lambda x: (not x.holds, x.refusal != "", x.memory.available_gib))
    if as_json:
        print(json.dumps({item.gpu: asdict(item) for item in found}, indent=2))
        return
    from peftcli.estimate.show import show_gpus

    show_gpus(found)


def _rows(loaded: LoadedRecipe) -> Rows:
    """What the files of the recipe hold, counted without a tokenizer."""
    if loaded.document.name == "--model" and loaded.recipe.data.train[0].path == UNREAD:
        return Rows()
    from peftcli.estimate.rows import count_rows

    return count_rows(loaded.recipe.data, Path.cwd())
