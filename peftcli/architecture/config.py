"""config.json -> Architecture, without loading a model library."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peftcli.architecture.build import OTHER_NAMES, PLAIN_NAMES, Groups, build
from peftcli.architecture.families import family_of
from peftcli.architecture.keys import Keys, read_json
from peftcli.architecture.layout import Layout
from peftcli.architecture.layouts import LAYOUTS
from peftcli.architecture.others import (
    OTHER_MODEL,
    other_mixer,
    refuse_other_files,
    refuse_other_models,
)
from peftcli.architecture.quirks import adjusted, assumed_layout
from peftcli.architecture.shapes import (
    Architecture,
    CheckpointQuantization,
    Experts,
    Linear,
    Tensor,
)
from peftcli.architecture.sizes import Sizes, read_sizes
from peftcli.architecture.targets import linear_shapes
from peftcli.architecture.towers import nemotron_groups, nemotron_kinds, siglip
from peftcli.errors import ArtefactError

__all__ = [
    "Architecture",
    "CheckpointQuantization",
    "Experts",
    "Linear",
    "Tensor",
    "architecture_from",
    "linear_shapes",
    "read_architecture",
]


def read_architecture(path: Path) -> Architecture:
    """Read a config.json, or the one in a model's folder.

    Raises ArtefactError when the file is missing, not JSON, or no decoder's configuration.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.exists() and (path / "adapter_config.json").is_file():
        refuse_other_files(Keys({"peft_type": ""}, str(path)))
    return architecture_from(read_json(file), where=str(file))


def architecture_from(config: Any, where: str = "config.json") -> Architecture:
    """Build the architecture from a parsed config.json; `where` names it in errors.

    An unknown model_type with the keys of an ordinary decoder is taken for a gated one, with
    `exact=False`. Raises ArtefactError that names the key that is missing or absurd.
    """
    if not isinstance(config, Mapping):
        kind = type(config).__name__
        raise ArtefactError(f"{where}: holds a {kind}, not an object", "Give a config.json.")
    keys = Keys(config, where)
    model_type = keys.text("model_type")
    if model_type is None:
        refuse_other_files(keys)
    text = keys.section("text_config")
    if text is not None and model_type not in LAYOUTS:
        return _wrapped(keys, text, model_type or "")
    return _decoder(keys, model_type or "")


def _decoder(keys: Keys, model_type: str, family_name: str = "") -> Architecture:
    known = LAYOUTS.get(model_type)
    if known is None:
        refuse_other_models(keys, model_type)
    layout = known or assumed_layout(keys)
    keys = Keys(keys.values, keys.where, layout.defaults)
    if model_type == "nemotron_h":
        return _nemotron(keys, layout)
    layout = adjusted(model_type, keys, layout)
    sizes = read_sizes(keys, layout) if known else _assumed_sizes(keys, layout, model_type)
    names = OTHER_NAMES.get(model_type) or (family_of(family_name or model_type) if known else None)
    family = names or PLAIN_NAMES
    groups = build(keys, layout, family, sizes)
    found = _architecture(keys, model_type, sizes, groups, layout.tied)
    return found if known else replace(found, exact=False, other_layers=other_mixer(keys))


def _assumed_sizes(keys: Keys, layout: Layout, model_type: str) -> Sizes:
    """The sizes of a model nobody has described; its own error where it is of another kind."""
    try:
        return read_sizes(keys, layout)
    except ArtefactError as error:
        reason = error.message.removeprefix(f"{keys.where}: ")
        raise ArtefactError(
            f"{keys.where}: {model_type!r} models are not supported: not known here, and not read "
            f"as an ordinary attention decoder either ({reason})",
            OTHER_MODEL,
        ) from None


def _nemotron(keys: Keys, layout: Layout) -> Architecture:
    kinds = nemotron_kinds(keys)
    keys.values["num_hidden_layers"] = len(kinds)  # the pattern rules in transformers too
    sizes = read_sizes(keys, layout)
    return _architecture(keys, "nemotron_h", sizes, nemotron_groups(keys, sizes, kinds), False)


def _wrapped(outer: Keys, text: Keys, model_type: str) -> Architecture:
    """A language model with other towers: Gemma 3 in full, of others the language model only."""
    inner = text.text("model_type") or f"{model_type}_text"
    shared = ("dtype", "torch_dtype", "quantization_config", "tie_word_embeddings")
    for key in shared:
        if key in outer.values:
            text.values.setdefault(key, outer.values[key])
    if model_type != "gemma3":
        found = replace(_decoder(text, inner), model_type=model_type)
        return found if model_type == "llama4" else replace(found, exact=False)
    found = replace(_decoder(text, inner, "gemma3"), model_type=model_type)
    vision = outer.section("vision_config")
    if vision is None:
        return replace(found, exact=False)
    linears, tensors = siglip(vision, found.hidden_size)
    return replace(
        found,
        linears=(*linears, *found.linears),
        tensors=(*tensors, *found.tensors),
        exact=not vision.flag("vision_use_head", True),  # no released Gemma 3 has that head
    )


UNFUSED_GELU = {"gpt2", "gptj", "gpt_neo", "codegen", "phi"}
"""Families whose activation is `gelu_new` where config.json does not say."""


def _architecture(
    keys: Keys, model_type: str, sizes: Sizes, groups: Groups, tied: bool
) -> Architecture:
    window = keys.optional("sliding_window", low=0) or None
    linears, experts, tensors = groups
    usual = "gelu_new" if model_type in UNFUSED_GELU else None
    activation = keys.text("activation_function", "hidden_act") or usual
    return Architecture(
        model_type=model_type,
        hidden_size=sizes.hidden,
        layers=sizes.layers,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_size=sizes.head_size,
        intermediate=sizes.intermediate,
        vocab_size=sizes.vocab,
        tied_embeddings=keys.flag("tie_word_embeddings", tied),
        max_positions=keys.optional("max_position_embeddings", "n_positions", "n_ctx"),
        dtype=(keys.text("dtype", "torch_dtype") or "").removeprefix("torch.") or None,
        sliding_window=window if keys.flag("use_sliding_window", True) else None,
        attention_softcap="attn_logit_softcapping" in keys.values,
        quantization=_quantization(keys),
        linears=linears,
        experts=experts,
        tensors=tensors,
        unfused_gelu=activation == "gelu_new",
    )


def _quantization(keys: Keys) -> CheckpointQuantization | None:
    section = keys.section("quantization_config")
    if section is None:
        return None
    method = section.text("quant_method") or "unknown"
    bits = section.optional("bits", "w_bit", high=64)
    if bits is None and section.flag("load_in_4bit", False):
        bits = 4
    if bits is None and section.flag("load_in_8bit", False):
        bits = 8
    group = section.optional("group_size", "q_group_size", low=-1)
    return CheckpointQuantization(
        method,
        bits or {"fp8": 8, "mxfp4": 4}.get(method),
        group=group if group and group > 0 else None,  # -1: one group for each row
        double=section.flag("bnb_4bit_use_double_quant", False),
    )
