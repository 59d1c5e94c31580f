"""The base model without weights, and how its files' tensors map to its parameters."""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from peftcli.errors import ArtefactError
from peftcli.merge.checkpoint import Stored
from peftcli.merge.deltas import Region


def skeleton(config: PreTrainedConfig, vocabulary: int | None) -> PreTrainedModel:
    """The causal language model on the meta device, with another number of tokens if given."""
    config = copy.deepcopy(config)
    if vocabulary is not None:
        config.get_text_config().vocab_size = vocabulary
        if "vocab_size" in vars(config):
            config.vocab_size = vocabulary
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        text = " ".join(str(error).split())[:300]
        raise ArtefactError(
            f"config.json: {config.model_type} is no causal language model known here: {text}",
            "name a base that AutoModelForCausalLM loads",
        ) from None
    return model


def input_embedding(model: PreTrainedModel) -> str:
    """The name of the embedding module."""
    return _name_of(model, model.get_input_embeddings())


def output_embedding(model: PreTrainedModel) -> str:
    """The name of the output head; empty where there is none."""
    return _name_of(model, model.get_output_embeddings())


def is_tied(model: PreTrainedModel) -> bool:
    """Whether embedding and output head are one parameter."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and head.weight is embedding.weight


@dataclass(frozen=True)
class Place:
    """Where a stored tensor lies in a parameter."""

    parameter: str
    expert: int | None = None
    """The expert, where the parameter holds all of them."""
    first: int = 0
    """The first of its rows within the expert."""

    def region(self, first: int, last: int) -> Region:
        """Rows of the stored tensor as a region of the parameter."""
        rows = slice(self.first + first, self.first + last)
        return (rows,) if self.expert is None else (self.expert, rows)


@dataclass(frozen=True)
class Unknown:
    """A stored tensor that becomes a parameter in a way that is not known here."""

    parameter: str
    operations: str


def places(
    model: PreTrainedModel, stored: Mapping[str, Stored]
) -> dict[str, Place | Unknown | None]:
    """For each tensor of the files, its place in the model; None where the model has no use for it.

    transformers' own table of renamings and conversions answers, as at loading.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    parameters = model.state_dict()
    found: dict[str, Place | Unknown | None] = {}
    for name, entry in stored.items():
        target, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, parameters
        )
        if target not in parameters:
            found[name] = None
        elif pattern is None:
            found[name] = Place(target)
        else:
            renamed, _ = rename_source_key(name, renamings, [])
            found[name] = _converted(by_pattern[pattern], pattern, renamed, target, entry)
    return found


def check_shapes(
    model: PreTrainedModel,
    stored: Mapping[str, Stored],
    found: Mapping[str, Place | Unknown | None],
) -> None:
    """Raise ArtefactError when the files are not the weights that config.json describes."""
    parameters = model.state_dict()
    parts: Counter[str] = Counter()
    for name, place in found.items():
        if not isinstance(place, Place):
            continue
        wanted, shape = tuple(parameters[place.parameter].shape), stored[name].shape
        if place.expert is not None:
            parts[place.parameter] += math.prod(shape)
            fits = wanted[2:] == shape[1:] and place.expert < wanted[0]
        else:
            fits = wanted == shape
        if not fits:
            raise ArtefactError(
                f"{stored[name].file}: {name} is {shape}, and {wanted} by config.json",
                "config and weights are of different models; download both again",
            )
    there = {place.parameter for place in found.values() if place is not None}
    there -= {name for name, count in parts.items() if count != parameters[name].numel()}
    tied = {f"{output_embedding(model)}.weight"} if is_tied(model) else set()
    absent = sorted(_weights(model) - there - tied)
    if absent:
        raise ArtefactError(
            f"the base lacks {len(absent)} tensors that its config.json has, such as {absent[0]}",
            "download its weights again",
        )


def _weights(model: PreTrainedModel) -> set[str]:
    return {name for name, _ in model.named_parameters()}


def _converted(
    converter: WeightConverter, pattern: str, name: str, target: str, entry: Stored
) -> Place | Unknown:
    """Experts stored one by one: stacked, and perhaps gate and up one below the other."""
    operations = converter.operations
    stacked = _is(operations[:1], MergeModulelist) and operations[0].dim == 0
    joined = len(operations) == 2 and _is(operations[1:], Concatenate) and operations[1].dim == 1
    expert = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), name)
    if not (stacked and (len(operations) == 1 or joined) and expert and len(entry.shape) == 2):
        return Unknown(target, ", ".join(map(str, operations)))
    block = converter.source_patterns.index(pattern)
    return Place(target, int(expert.group(1)), block * entry.shape[0])


def _is(operations: Iterable[object], kind: type) -> bool:
    return all(isinstance(operation, kind) for operation in operations)


def _name_of(model: PreTrainedModel, module: torch.nn.Module | None) -> str:
    return next((name for name, other in model.named_modules() if other is module), "")
