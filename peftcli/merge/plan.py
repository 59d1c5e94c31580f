"""What will be written: each tensor's source, updates, shape, dtype and place in a file."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from peftcli.errors import ArtefactError
from peftcli.merge.checkpoint import SINGLE, Stored
from peftcli.merge.deltas import Update
from peftcli.merge.skeleton import (
    Place,
    Unknown,
    input_embedding,
    is_tied,
    output_embedding,
)

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Item:
    """One tensor of the result."""

    name: str
    source: Stored
    place: Place | None
    updates: tuple[Update, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    dequantized: bool = False
    """Whether the base's values are rounded as the run's were first."""
    transposed: bool = False
    """Whether the 4-bit rounding works on the transposed weight."""
    added: bool = False
    """Whether the base's files have no tensor of this name."""

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def copied(self) -> bool:
        """Whether it is a tensor of the base's files, byte for byte."""
        changed = self.updates or self.dequantized or self.dtype != self.source.dtype
        return not changed and self.source.values is None


@dataclass(frozen=True)
class Plan:
    """The result, file by file."""

    shards: Mapping[str, tuple[Item, ...]]
    untied: bool
    vocabulary: tuple[int, int] | None
    """Rows of the embedding before and after, where they differ."""

    @property
    def items(self) -> list[Item]:
        """Every tensor."""
        return [item for items in self.shards.values() for item in items]

    @property
    def bytes(self) -> int:
        """Size of the weights."""
        return sum(item.bytes for item in self.items)


@dataclass(frozen=True)
class Changes:
    """What all adapters together do to the base's parameters."""

    updates: Mapping[str, Sequence[Update]]
    carried: Mapping[str, Update]
    tied_rows: bool


def make_plan(
    model: PreTrainedModel,
    stored: Mapping[str, Stored],
    found: Mapping[str, Place | Unknown | None],
    changes: Changes,
    *,
    save_dtype: torch.dtype | None,
    quantized: Mapping[str, bool],
) -> Plan:
    """The plan of a merge; raises ArtefactError where an update has no known place."""
    updates, untied = _settle_tied(model, changes)
    _check_places(found, updates)
    embedding = f"{input_embedding(model)}.weight"
    head = f"{output_embedding(model)}.weight"
    shards: dict[str, list[Item]] = defaultdict(list)
    vocabulary = None
    for name, source in stored.items():
        place = found[name]
        parameter = None if place is None else place.parameter
        own = tuple(updates.get(parameter, ())) if parameter else ()
        item = Item(
            name=name,
            source=source,
            place=place if isinstance(place, Place) else None,
            updates=own,
            shape=_shape(source, place, own),
            dtype=_dtype(source, save_dtype),
            dequantized=parameter in quantized,
            transposed=bool(parameter and quantized.get(parameter)),
        )
        file = source.file.name if source.file.suffix == ".safetensors" else _renamed(source)
        shards[file].append(item)
        if parameter == embedding:
            if item.shape != source.shape:
                vocabulary = (source.shape[0], item.shape[0])
            if untied and head not in stored:
                shards[file].append(_head(item, head, updates.get(head, ()), source))
    return Plan({file: tuple(items) for file, items in shards.items()}, untied, vocabulary)


def _settle_tied(model: PreTrainedModel, changes: Changes) -> tuple[dict[str, list[Update]], bool]:
    """Updates with the base values that came along, and whether tied embeddings part ways."""
    updates = {name: list(own) for name, own in changes.updates.items()}
    carried = dict(changes.carried)
    embedding = f"{input_embedding(model)}.weight"
    head = f"{output_embedding(model)}.weight"
    untied = False
    _check_grown(model, changes)
    if is_tied(model):
        if changes.tied_rows and head not in updates:
            updates[head] = updates.get(embedding, [])
        for name, other in ((embedding, head), (head, embedding)):
            if other in carried:
                carried.setdefault(name, carried[other])
        untied = not _same(updates.get(embedding, []), updates.get(head, []))
    for name, values in carried.items():
        updates[name] = [values, *updates.get(name, [])]
    return updates, untied


def _check_grown(model: PreTrainedModel, changes: Changes) -> None:
    """Rows that were added to an embedding and not saved with the adapter are lost."""
    own = model.get_input_embeddings().weight.shape[0]
    names = [f"{name}.weight" for name in (input_embedding(model), output_embedding(model)) if name]
    rows = dict.fromkeys(names, own)
    for name in names:
        values = [changes.carried.get(name), *changes.updates.get(name, ())]
        rows[name] = max(own, *(update.rows or 0 for update in values if update is not None), 0)
        least = max((update.least for update in values if update is not None), default=0)
        if least > max(rows.values()):
            raise ArtefactError(
                f"the adapter tunes token {least - 1}, the base has {rows[name]} rows in {name}, "
                "and the added rows were not saved with the adapter",
                "save it again with save_embedding_layers=True",
            )
    fewest = min(rows, key=rows.__getitem__)
    if rows[fewest] < max(rows.values()) and not is_tied(model):
        raise ArtefactError(
            f"the adapter brings {max(rows.values()) - own} new rows for one embedding, and none "
            f"for {fewest}, which grew with it",
            "save it again with save_embedding_layers=True",
        )


def _same(first: Sequence[Update], second: Sequence[Update]) -> bool:
    return len(first) == len(second) and all(
        one.same_as(other) for one, other in zip(first, second, strict=True)
    )


def _head(embedding: Item, name: str, updates: Sequence[Update], source: Stored) -> Item:
    """The output head that was the embedding until now."""
    return replace(
        embedding,
        name=name,
        place=Place(name),
        updates=tuple(updates),
        shape=_shape(source, None, updates),
        added=True,
    )


def _check_places(
    found: Mapping[str, Place | Unknown | None], updates: Mapping[str, Sequence[Update]]
) -> None:
    for name, place in found.items():
        if isinstance(place, Unknown) and updates.get(place.parameter):
            raise ArtefactError(
                f"the adapter changes {place.parameter}, which the base's files hold as {name} "
                f"in a layout that is not known here ({place.operations})",
                "merge it with PEFT's merge_and_unload",
            )


def _shape(
    source: Stored, place: Place | Unknown | None, updates: Sequence[Update]
) -> tuple[int, ...]:
    """The source's shape, with more rows where an embedding grew."""
    rows = [update.rows for update in updates if update.rows is not None]
    in_part = isinstance(place, Place) and place.expert is not None
    if not source.shape or not rows or in_part:
        return source.shape
    return (max(source.shape[0], *rows), *source.shape[1:])


def _dtype(source: Stored, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and source.dtype in FLOATS else source.dtype


def _renamed(source: Stored) -> str:
    """The safetensors file that stands for a pickle."""
    name = source.file.name.replace("pytorch_model", "model")
    return SINGLE if name == "model.bin" else name.removesuffix(".bin") + ".safetensors"
