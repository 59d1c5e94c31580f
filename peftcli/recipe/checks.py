"""Rules between recipe and architecture, checked before any weights are loaded."""

from __future__ import annotations

from peftcli.architecture.shapes import Architecture
from peftcli.errors import RecipeError
from peftcli.methods.base import Method
from peftcli.recipe.document import Path, dotted
from peftcli.recipe.load import LoadedRecipe
from peftcli.recipe.schema import Recipe

# Packed rows have the losses of rows alone: held by tests/train/test_packing.py.
PACKABLE = {
    *("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text"),
    *("phi3", "gpt_neox", "gpt2", "stablelm", "olmo2", "granite", "mixtral"),
}
# Packed by a mask instead of by row borders: gemma2's soft-capped scores are only in the eager
# kernel, and stablelm's layers do not hand the borders on.
NO_VARLEN = {"gemma2", "stablelm"}
BEHIND_A_MASK = "micro_batch_size 1: a mask as large as a sequence squared keeps packed rows apart"
FUSED = {"llama", "mistral", "phi3", "qwen2", "qwen3"}
"""Families whose layers run on the fused functions of peftcli/train/fast."""
UNPACKABLE = {
    "opt": "it numbers positions across rows",
    "falcon": "its ALiBi bias counts positions across rows",
    "bloom": "its ALiBi bias counts positions across rows",
    "mpt": "its ALiBi bias counts positions across rows",
    "nemotron_h": "its state-space layers carry state across rows",
}


def packs(recipe: Recipe, architecture: Architecture) -> bool:
    """Whether rows share sequences; `auto` packs plain text on models known to keep rows apart."""
    packing = recipe.training.packing
    if packing != "auto":
        return packing
    return recipe.data.format == "text" and architecture.model_type in PACKABLE


def rows_apart(recipe: Recipe, architecture: Architecture) -> bool:
    """Whether rows lie end to end without padding, kept apart by the attention kernel.

    Not with NEFTune, whose noise depends on the length of the sequence.
    """
    return (
        recipe.model.attention == "auto"
        and recipe.training.neftune_noise_alpha is None
        and architecture.model_type in PACKABLE - NO_VARLEN
    )


def one_at_a_time(recipe: Recipe, architecture: Architecture) -> bool:
    """Whether sequences of packed rows are computed one by one: a mask keeps their rows apart.

    A mask over several sequences would be as large as the square of them all.
    """
    return packs(recipe, architecture) and not rows_apart(recipe, architecture)


def check_architecture(loaded: LoadedRecipe, architecture: Architecture) -> None:
    """Raise RecipeError with every line of the recipe that cannot work on this model."""
    found = method_problems(loaded.recipe.method, architecture)
    what = loaded.recipe.training.asks_for_fused_layers
    if what and not found:
        found += checkpointing_problems(what, loaded.recipe, architecture)
    reason = UNPACKABLE.get(architecture.model_type)
    if architecture.other_layers is not None:
        reason = f"not all of its layers are attention ({architecture.other_layers})"
    if loaded.recipe.training.packing is True and reason:
        text = f"{architecture.model_type} models cannot be packed: {reason}; write `false`"
        found.append((("training", "packing"), text))
    limit = architecture.max_positions
    written = loaded.origin(("data", "max_length")) != "default"
    if limit and written and loaded.recipe.data.max_length > limit:
        text = f"{loaded.recipe.data.max_length} is above the {limit} positions of this model"
        found.append((("data", "max_length"), text))
    if found:
        lines = [f"{loaded.document.place(path)}: {dotted(path)}: {text}" for path, text in found]
        raise RecipeError("\n".join(lines), f"the model is a {architecture.model_type}")


def method_problems(method: Method, architecture: Architecture) -> list[tuple[Path, str]]:
    """Why a method cannot work on a model; empty where it can."""
    found: list[tuple[Path, str]] = [
        (("method", *keys), text) for keys, text in method.problems(architecture)
    ]
    if method.frozen_in_fp8:
        found += fp8_problems(architecture)
    return found + stored_problems(method, architecture)


def stored_problems(method: Method, architecture: Architecture) -> list[tuple[Path, str]]:
    """What cannot be done with a checkpoint because it is quantised already."""
    stored = architecture.quantization
    if stored is None or stored.method == "unknown":
        return []
    asked = method.footprint(architecture)
    if asked.trains_base and stored.held:
        text = f"trains every weight, and this checkpoint is stored in {stored.method}"
        return [(("method", "name"), f"{text}; name the 16-bit one, or write `lora`")]
    if asked.quantization in ("nf4", "fp4") and stored.method != "bitsandbytes":
        text = f"{asked.quantization} is for 16-bit checkpoints, and this is stored in"
        without = "write `lora`, or `adapter` without it"
        return [(("method", "quantization"), f"{text} {stored.method}; {without}")]
    return []


def fp8_problems(architecture: Architecture) -> list[tuple[Path, str]]:
    """Why the base cannot be held in fp8, which the fused layers do."""
    key = ("method", "quantization")
    if architecture.model_type not in FUSED:
        known = ", ".join(sorted(FUSED))
        return [(key, f"fp8 runs on {known} models; remove it, or write `name: qlora`")]
    if architecture.quantization is not None:
        stored = architecture.quantization.method
        return [(key, f"this checkpoint is stored in {stored}; name the 16-bit one")]
    return []


def checkpointing_problems(
    what: str, recipe: Recipe, architecture: Architecture
) -> list[tuple[Path, str]]:
    """Why a way of checkpointing that only fused layers have cannot be had."""
    key = ("training", "checkpointing")
    if architecture.model_type not in FUSED:
        return [(key, f"{what} runs on {', '.join(sorted(FUSED))} models; write `full`")]
    if architecture.quantization is not None:
        stored = architecture.quantization.method
        return [(key, f"{what} needs a 16-bit checkpoint, and this is {stored}; write `full`")]
    if not recipe.method.footprint(architecture).fusible:
        text = f"{what} runs on fused layers, which leave out what {recipe.method.name} does here"
        return [(key, f"{text}; write `full`")]
    number, layers = recipe.training.checkpointing, architecture.layers
    if isinstance(number, int) and number > layers:
        return [(key, f"{number} is above the {layers} layers of this model; write `full`")]
    return []


def longest_row(loaded: LoadedRecipe, architecture: Architecture) -> int:
    """`data.max_length`; where nobody wrote it, at most the positions of the model."""
    positions = architecture.max_positions or loaded.recipe.data.max_length
    return min(loaded.recipe.data.max_length, positions)
