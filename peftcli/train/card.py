"""README.md of the adapter folder: what it is, how it was made, how to use it."""

from __future__ import annotations

import yaml
from transformers import TrainerState

from peftcli import __version__
from peftcli.recipe.load import recipe_text
from peftcli.recipe.schema import Recipe
from peftcli.words import counted


def model_card(recipe: Recipe, state: TrainerState) -> str:
    """A model card in the hub's format, with the whole recipe."""
    head = {
        "base_model": recipe.model.name,
        "library_name": "peft" if recipe.method.saves_adapter else "transformers",
        "tags": ["peftcli", recipe.method.name],
    }
    best = f", best held-out loss {state.best_metric:.4f}" if state.best_metric else ""
    return (
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n"
        f"# {recipe.method.name} on {recipe.model.name}\n\n"
        f"Made with peftcli {__version__}: {counted(state.global_step, 'step')}{best}.\n\n"
        f"{_usage(recipe)}\n"
        f"## Recipe\n\n```yaml\n{recipe_text(recipe)}```\n"
    )


def _usage(recipe: Recipe) -> str:
    if recipe.method.mergeable:
        return "Load it with PEFT on its base, or merge it: `peftcli merge RUN --fp32`.\n"
    if not recipe.method.saves_adapter:
        return "Load it with `AutoModelForCausalLM.from_pretrained`.\n"
    return (
        "A bottleneck adapter is non-linear: it cannot be merged. Load it on its base after\n"
        "`import peftcli.methods.bottleneck_tuner`, which registers the method with PEFT.\n"
    )
