"""The new values of one tensor, a few rows at a time, and what rounding them cost."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from peftcli.merge.blocks import BLOCK
from peftcli.merge.deltas import Region, run_chain
from peftcli.merge.direct import PIECE_BYTES, Memory
from peftcli.merge.plan import Item
from peftcli.merge.quantized import Quantization

CPU_ELEMENTS = 1 << 18  # what is worked on at once stays in a CPU's cache
GPU_ELEMENTS = 1 << 25
LOOK = 16  # of a large tensor, every sixteenth block tells what rounding cost
_whole_tensors = threading.BoundedSemaphore(2)  # at once, however many workers there are
ROWS = 32  # products of fewer rows go through other kernels, which round otherwise


@dataclass(frozen=True)
class Arithmetic:
    """How products and sums are made."""

    device: torch.device
    fp32: bool
    quantization: Quantization | None


@dataclass(frozen=True)
class Rounding:
    """What the saved dtype does to the update, as sums over a tensor's values.

    Of large tensors a part is looked at, and stands for the rest.
    """

    touched: int = 0
    unchanged: int = 0
    error_squared: float = 0.0
    update_squared: float = 0.0
    finite: bool = True
    """Whether every stored value is a number."""

    def __add__(self, other: Rounding) -> Rounding:
        return Rounding(
            self.touched + other.touched,
            self.unchanged + other.unchanged,
            self.error_squared + other.error_squared,
            self.update_squared + other.update_squared,
            self.finite and other.finite,
        )

    def times(self, factor: float) -> Rounding:
        """The same for a part of the tensor that is this many times as large."""
        return Rounding(
            round(self.touched * factor),
            round(self.unchanged * factor),
            self.error_squared * factor,
            self.update_squared * factor,
            self.finite,
        )

    @property
    def relative_error(self) -> float:
        """Norm of what rounding added over the norm of the update."""
        if not self.update_squared:
            return 0.0
        return math.sqrt(self.error_squared / self.update_squared)


@contextmanager
def single_threaded() -> Iterator[None]:
    """One thread for each product: workers take several tensors at once instead."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def new_rows(
    item: Item, arithmetic: Arithmetic, memory: Memory
) -> Iterator[tuple[torch.Tensor, Rounding]]:
    """The tensor's new rows in order, in its saved dtype; `memory` holds what is read."""
    with torch.inference_mode():
        if not item.shape:
            yield _part(item, item.source.read(), slice(0, 1), arithmetic, stands_for=1.0)
            return
        chunks = list(_chunks(item, arithmetic))
        looked = range(0, len(chunks), LOOK if len(chunks) > LOOK else 1)
        stands_for = dict.fromkeys(looked, item.shape[0] / _count(chunks[i] for i in looked))
        if not _whole(item, chunks):
            parts = _read(item, chunks, memory)
            for place, (rows, base) in enumerate(_rounded(item, chunks, parts, arithmetic)):
                yield _part(item, base, rows, arithmetic, stands_for=stands_for.get(place))
            return
        with _whole_tensors:
            values = _base(item, arithmetic)
            for place, rows in enumerate(chunks):
                yield _part(item, values[rows], rows, arithmetic, stands_for=stands_for.get(place))


def held_whole(item: Item, arithmetic: Arithmetic) -> bool:
    """Whether the tensor is in memory as a whole while it is worked on."""
    return bool(item.shape) and _whole(item, list(_chunks(item, arithmetic)))


def _whole(item: Item, chunks: Sequence[slice]) -> bool:
    """Where an update needs it so, or where the blocks of rounding cross the borders of chunks."""
    if any(update.whole for update in item.updates):
        return True
    row = math.prod(item.shape[1:])
    crossed = any(rows.start * row % BLOCK for rows in chunks)
    return item.dequantized and (item.transposed or crossed)


def _rounded(
    item: Item,
    chunks: Sequence[slice],
    parts: Iterator[tuple[slice, torch.Tensor]],
    arithmetic: Arithmetic,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """What was read, as the run held it."""
    if not item.dequantized or arithmetic.quantization is None:
        return parts
    values = (base.to(arithmetic.device) for _, base in parts)
    count = math.prod(item.source.shape)
    return zip(chunks, arithmetic.quantization.round_parts(values, count), strict=True)


def _read(
    item: Item, chunks: Sequence[slice], memory: Memory
) -> Iterator[tuple[slice, torch.Tensor]]:
    """The base's values of each chunk, several of which are read at once."""
    source = item.source
    row = source.bytes // source.shape[0] if source.shape and source.shape[0] else 0
    for together in _groups(chunks, PIECE_BYTES // max(1, row)):
        first = together[0].start
        values = source.read(slice(first, together[-1].stop), memory)
        for rows in together:
            yield rows, values[rows.start - first : rows.stop - first]


def _groups(chunks: Sequence[slice], most: int) -> Iterator[list[slice]]:
    """Neighbours with at most so many rows together, or one with more."""
    group: list[slice] = []
    for rows in chunks:
        if group and rows.stop - group[0].start > most:
            yield group
            group = []
        group.append(rows)
    yield group


def _base(item: Item, arithmetic: Arithmetic) -> torch.Tensor:
    values = item.source.read()
    if not item.dequantized or arithmetic.quantization is None:
        return values
    values = values.to(arithmetic.device)
    return arithmetic.quantization.round_trip(values, transposed=item.transposed)


def _part(
    item: Item,
    base: torch.Tensor,
    rows: slice,
    arithmetic: Arithmetic,
    *,
    stands_for: float | None,
) -> tuple[torch.Tensor, Rounding]:
    """New rows, and what rounding cost if they stand for a part of the tensor."""
    if not item.updates:
        return base.to(item.dtype), Rounding()
    base = base.to(arithmetic.device)
    values, region = base.float() if arithmetic.fp32 else base, _region(item, rows)
    new = run_chain(item.updates, values, region)
    stored = new.to(item.dtype)
    if not _finite(new, stored):
        return stored, Rounding(finite=False)
    if stands_for is None:
        return stored, Rounding()
    if not arithmetic.fp32:  # what it cost shows beside the exact sum only
        values = base.float()
        new = run_chain(item.updates, values, region)
    return stored, _rounding(values, base.to(item.dtype), new, stored).times(stands_for)


def _finite(new: torch.Tensor, stored: torch.Tensor) -> bool:
    """Whether all stored values are numbers; a norm within the dtype's range already says so."""
    if float(torch.linalg.vector_norm(new.float())) <= torch.finfo(stored.dtype).max:
        return True
    return bool(torch.isfinite(stored).all())


def _rounding(
    values: torch.Tensor, kept: torch.Tensor, new: torch.Tensor, stored: torch.Tensor
) -> Rounding:
    """`kept` is what would have been stored without the update."""
    error = stored.float() - new
    if new.shape != values.shape:  # new rows have no old value to compare with
        new, stored = new[: values.shape[0]], stored[: values.shape[0]]
    changed = new - values
    touched = int(torch.count_nonzero(changed))
    return Rounding(
        touched=touched,
        unchanged=max(0, touched - _different(stored, kept)),
        error_squared=float(torch.linalg.vector_norm(error)) ** 2,
        update_squared=float(torch.linalg.vector_norm(changed.float())) ** 2,
    )


def _different(one: torch.Tensor, other: torch.Tensor) -> int:
    """How many values differ; PyTorch compares 16-bit floats ten times slower than their bits."""
    if one.device.type != "cpu":
        return int(torch.count_nonzero(one != other))
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return int(np.count_nonzero(one.view(bits).numpy() != other.view(bits).numpy()))


def _count(parts: Iterable[slice]) -> int:
    return sum(part.stop - part.start for part in parts) or 1


def _region(item: Item, rows: slice) -> Region:
    if item.place is None:
        return (rows,)
    return item.place.region(rows.start, rows.stop)


def _chunks(item: Item, arithmetic: Arithmetic) -> Iterator[slice]:
    count = item.shape[0]
    if any(update.whole for update in item.updates):
        yield slice(0, count)
        return
    limit = GPU_ELEMENTS if arithmetic.device.type == "cuda" else CPU_ELEMENTS
    rows = limit // max(1, math.prod(item.shape[1:]))
    step = max(1 if len(item.shape) > 2 else ROWS, rows // ROWS * ROWS)
    firsts = (
        list(range(0, max(1, count - ROWS + 1), step)) if step >= ROWS else range(max(1, count))
    )
    for first, last in zip(firsts, [*firsts[1:], count], strict=True):
        yield slice(first, last)
