"""Which prepared rows are trained on and which are held out, decided by hashes of their text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np  # noqa: TID253 - this file is heavy
from numpy.typing import NDArray  # noqa: TID253

from peftcli.errors import DataError
from peftcli.preparing.work import Hashes, SplitRows

Index = NDArray[np.int64]


@dataclass(frozen=True)
class Choices:
    """What the recipe says about splits and repeated rows."""

    share: float | None
    """The share of the training rows to hold out, if any."""
    duplicates: Literal["keep", "drop"]
    overlap: Literal["drop", "allow", "error"]
    limit: int | None
    weights: Mapping[int, float]
    """How often each training source is seen."""
    seed: int


@dataclass(frozen=True)
class Arranged:
    """Positions of rows in the files of their split, and what was found on the way."""

    train: Index
    eval: Index | None
    eval_split: str
    """The split whose file holds the evaluation rows."""
    duplicates: Mapping[str, int]
    overlap: int
    weighed: int = 0
    """Training rows more than there are, by the weights of their sources; fewer below zero."""
    limited: int = 0
    """Training rows left out by the limit."""
    warnings: list[str] = field(default_factory=list)


def arrange(rows: Mapping[str, SplitRows], choices: Choices) -> Arranged:
    """Drop, hold out, weigh and limit, in this order; the same rows and seed give the same sets."""
    duplicates: dict[str, int] = {}
    chosen: dict[str, Index] = {}
    warnings: list[str] = []
    for split, known in rows.items():
        _, first = np.unique(known.contents, return_index=True)
        duplicates[split] = len(known.contents) - len(first)
        every = np.arange(len(known.contents))
        chosen[split] = np.sort(first) if choices.duplicates == "drop" else every
    train, held, split, overlap = chosen["train"], chosen.get("eval"), "eval", 0
    contents = rows["train"].contents
    if choices.share is not None:
        mask, grouped = _held_out(rows["train"], train, choices)
        train, held, split = train[~mask], train[mask], "train"
        if not grouped:
            warnings.append(
                "rows with the same question are in both training and evaluation rows, because "
                "too few different questions exist to hold some out; only equal rows are kept apart"
            )
    elif held is not None:
        seen = np.isin(rows["eval"].contents[held], contents[train])
        overlap = int(seen.sum())
        if overlap and choices.overlap == "error":
            raise DataError(
                f"data.eval: {overlap} of {len(held)} evaluation rows are training rows too",
                "remove them, or write `data.overlap: drop` to leave them out of the evaluation",
            )
        held = held[~seen] if choices.overlap == "drop" else held
        if not len(held):
            raise DataError(
                "data.eval: every evaluation row is a training row too",
                "name other rows, or write `data.overlap: allow`",
            )
    own = len(train)
    train = _weighed(train, rows["train"], choices)
    weighed, limited = len(train) - own, 0
    if choices.limit is not None and len(train) > choices.limit:
        limited = len(train) - choices.limit
        train = train[np.linspace(0, len(train) - 1, choices.limit).astype(np.int64)]
    return Arranged(train, held, split, duplicates, overlap, weighed, limited, warnings)


def _held_out(rows: SplitRows, train: Index, choices: Choices) -> tuple[NDArray[np.bool_], bool]:
    """Rows to hold out, and whether rows with the same question stay together."""
    target = max(1, round((choices.share or 0) * len(train)))
    for by_question in (True, False):
        keys = (rows.groups if by_question else rows.contents)[train]
        groups, counts = np.unique(keys, return_counts=True)
        order = np.argsort(mixed(groups, choices.seed), kind="stable")
        order = order[counts[order] <= target]
        taken = order[np.cumsum(counts[order]) <= target]
        mask = np.isin(keys, groups[taken])
        held = int(mask.sum())
        if 0 < held < len(train) and held * 2 >= target:
            return mask, by_question
    raise DataError(
        f"data.eval: {len(train)} usable training rows are too few to hold some out",
        "write `data.eval: null`, or name a file with evaluation rows",
    )


def _weighed(train: Index, rows: SplitRows, choices: Choices) -> Index:
    """Repeat a source's rows by the whole part of its weight, and a part of them once more."""
    if all(weight == 1 for weight in choices.weights.values()):
        return train
    parts, start = [], 0
    for source, count in sorted(rows.per_source.items()):
        own = train[(train >= start) & (train < start + count)]
        start += count
        whole, part = divmod(choices.weights.get(source, 1.0), 1.0)
        parts += [own] * int(whole)
        order = np.argsort(mixed(own.astype(np.uint64), choices.seed + source), kind="stable")
        parts.append(np.sort(own[order[: round(part * len(own))]]))
    return np.concatenate(parts)


def mixed(keys: Hashes, seed: int) -> Hashes:
    """Keys in an order that depends on the seed alone (the finaliser of SplitMix64)."""
    with np.errstate(over="ignore"):
        mix = keys + np.uint64(seed % 2**64) * np.uint64(0x9E3779B97F4A7C15)
        mix = (mix ^ (mix >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mix = (mix ^ (mix >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return mix ^ (mix >> np.uint64(31))
