"""What the processes that tokenise are told, and what they give back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np  # noqa: TID253 - this file is heavy
from numpy.typing import NDArray  # noqa: TID253

from peftcli.data.hub import HubSet
from peftcli.data.rows import DataFile
from peftcli.data.scan import Range
from peftcli.rendering.probe import Turns
from peftcli.rendering.template import TemplateSource

MASKED = -100
SHOWN = 10
Ints = NDArray[np.int32]
Hashes = NDArray[np.uint64]
Progress = Callable[[float, int], None]
"""Called with the share that is done, and the number of rows."""


@dataclass(frozen=True)
class Form:
    """How the rows of one file are read."""

    name: str
    columns: Mapping[str, str]
    labels: Mapping[str, str]


@dataclass(frozen=True)
class Work:
    """What a process needs to turn rows into tokens; plain data."""

    tokenizer: str
    """The tokenizer as JSON."""
    template: TemplateSource
    turns: Turns
    added: tuple[str, ...]
    train_on: Literal["answers", "all", "last"]
    system: str | None
    max_length: int
    too_long: Literal["auto", "error", "drop", "truncate", "split"]
    begin: tuple[str, int] | None
    """The token that plain text begins with, if the tokenizer has one."""
    end: tuple[str, int]
    unknown: int | None
    stop_at_bad: bool
    """After a bad row, rows are only checked, because the run will not go on."""


@dataclass
class Batch:
    """Rows with their tokens, flat: row i holds `lengths[i]` of `ids` and `labels`."""

    ids: Ints
    labels: Ints
    lengths: Ints
    trained: Ints
    """How many tokens of each row carry loss."""
    contents: Hashes
    """A hash of each row's text."""
    groups: Hashes
    """A hash of what each row asks; rows that ask the same belong on one side of a split."""
    counts: Counter[str] = field(default_factory=Counter)
    largest_id: int = 0
    bad: list[str] = field(default_factory=list)
    too_long: list[str] = field(default_factory=list)


def joined(parts: Sequence[Batch], counts: Counter[str], bad: list[str]) -> Batch:
    """Several batches as one; `counts` are those of all of them."""
    return Batch(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.lengths for part in parts]),
        np.concatenate([part.trained for part in parts]),
        np.concatenate([part.contents for part in parts]),
        np.concatenate([part.groups for part in parts]),
        counts,
        max(part.largest_id for part in parts),
        bad,
        [line for part in parts for line in part.too_long][:SHOWN],
    )


@dataclass(frozen=True)
class Part:
    """A file or hub set of one source, in the order of the plan."""

    split: str
    source: int
    place: DataFile | HubSet
    form: Form
    size: int
    """Bytes, for the progress and the number of workers."""
    ranges: tuple[Range, ...] = ()
    """Cut points of a file that several processes can read."""


@dataclass(frozen=True)
class Plan:
    """Everything to prepare; plain data, so that another process can have it."""

    work: Work
    parts: tuple[Part, ...]
    limits: dict[tuple[str, int], int]
    """The most rows of a source, by split and number."""
    workers: int


@dataclass
class SplitRows:
    """What is known of the rows of a split, without their tokens; rows stand in file order."""

    lengths: Ints
    trained: Ints
    contents: Hashes
    groups: Hashes
    per_source: dict[int, int]
    counts: Counter[str]
    largest_id: int = 0
    bad: list[str] = field(default_factory=list)
    too_long: list[str] = field(default_factory=list)
