"""Every row of a plan through `Tokenizing`, on several processes, to Arrow files on disk.

It imports no torch, so that its workers can be forked from a small process (see
`prepare_process`): they share one tokenizer in memory. Rows are written in their order.
"""

from __future__ import annotations

import multiprocessing
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np  # noqa: TID253 - this file is heavy
import pyarrow as pa  # noqa: TID253

from peftcli.data.bytestream import open_data
from peftcli.data.hub import HubSet, hub_rows
from peftcli.data.jsontext import json_lines
from peftcli.data.readers import read_file
from peftcli.data.rows import RawRow
from peftcli.data.scan import Range
from peftcli.errors import ResourceError
from peftcli.preparing.tokenizing import Tokenizing
from peftcli.preparing.work import SHOWN, Batch, Part, Plan, Progress, SplitRows

ROWS = 500
CHARACTERS = 1 << 19
SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("length", pa.int32()),
    ]
)


@dataclass(frozen=True)
class _Task:
    part: int
    rows: tuple[RawRow, ...] | Range
    done: float


def prepare_rows(plan: Plan, folder: Path, progress: Progress) -> dict[str, SplitRows]:
    """Write `<split>.arrow` for each split into `folder`; at most a few MiB a worker in memory."""
    splits = list(dict.fromkeys(part.split for part in plan.parts))
    batches: dict[str, list[tuple[int, Batch]]] = {split: [] for split in splits}
    rows = 0
    with ExitStack() as stack:
        sinks = {
            split: stack.enter_context(_sink(folder / f"{split}.arrow", stack)) for split in splits
        }
        for task, batch in _batches(plan, stack):
            part = plan.parts[task.part]
            if len(batch.lengths):
                sinks[part.split].write_batch(_record(batch))
            batch.ids = batch.labels = np.empty(0, np.int32)
            batches[part.split].append((part.source, batch))
            rows += batch.counts["read"]
            progress(task.done, rows)
    return {split: _joined(batches[split]) for split in splits}


def _sink(path: Path, stack: ExitStack) -> pa.RecordBatchStreamWriter:
    return pa.ipc.new_stream(stack.enter_context(pa.OSFile(str(path), "wb")), SCHEMA)


def _record(batch: Batch) -> pa.RecordBatch:
    offsets = pa.array(np.concatenate([[0], np.cumsum(batch.lengths)]).astype(np.int32))
    columns = [
        pa.ListArray.from_arrays(offsets, pa.array(batch.ids)),
        pa.ListArray.from_arrays(offsets, pa.array(batch.labels)),
        pa.array(batch.lengths),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _joined(batches: list[tuple[int, Batch]]) -> SplitRows:
    per_source: Counter[int] = Counter()
    for source, batch in batches:
        per_source[source] += len(batch.lengths)
    parts = [batch for _, batch in batches]
    return SplitRows(
        np.concatenate([np.empty(0, np.int32), *(batch.lengths for batch in parts)]),
        np.concatenate([np.empty(0, np.int32), *(batch.trained for batch in parts)]),
        np.concatenate([np.empty(0, np.uint64), *(batch.contents for batch in parts)]),
        np.concatenate([np.empty(0, np.uint64), *(batch.groups for batch in parts)]),
        dict(per_source),
        sum((batch.counts for batch in parts), Counter()),
        max((batch.largest_id for batch in parts), default=0),
        list(islice((line for batch in parts for line in batch.bad), SHOWN)),
        list(islice((line for batch in parts for line in batch.too_long), SHOWN)),
    )


def _batches(plan: Plan, stack: ExitStack) -> Iterator[tuple[_Task, Batch]]:
    """Results in the order of their tasks; a few tasks for each worker are on their way."""
    if plan.workers == 1:
        worker = _Worker(plan)
        for task in _tasks(plan):
            yield task, worker(task)
        return
    global _WORKER
    _WORKER = _Worker(plan)
    context = multiprocessing.get_context("fork")
    pool = stack.enter_context(ProcessPoolExecutor(plan.workers, mp_context=context))
    pool.submit(int).result()  # forks all workers now, before a reader may start threads
    waiting: deque[tuple[_Task, Future[Batch]]] = deque()
    try:
        for task in _tasks(plan):
            waiting.append((task, pool.submit(_in_worker, task)))
            if len(waiting) > 2 * plan.workers:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    except BrokenProcessPool:
        raise ResourceError(
            "a process that prepares rows was killed, most likely for want of memory",
            "close other programs, or use a machine with more memory",
        ) from None


def _tasks(plan: Plan) -> Iterator[_Task]:
    total = sum(part.size for part in plan.parts) or 1
    left = dict(plan.limits)
    before = 0
    for number, part in enumerate(plan.parts):
        limit = left.get((part.split, part.source))
        if part.ranges and limit is None:
            for span in part.ranges:
                yield _Task(number, span, (before + span.start + span.size) / total)
        else:
            taken = seen = 0
            for rows, size in _groups(islice(_rows(part), limit)):
                taken, seen = taken + len(rows), seen + size
                yield _Task(number, rows, (before + min(seen, part.size)) / total)
            if limit is not None:
                left[part.split, part.source] = limit - taken
        before += part.size


def _rows(part: Part) -> Iterator[RawRow]:
    return hub_rows(part.place) if isinstance(part.place, HubSet) else read_file(part.place)


def _groups(rows: Iterator[RawRow]) -> Iterator[tuple[tuple[RawRow, ...], int]]:
    """Rows in groups that are small both in number and in text, with about their bytes."""
    group: list[RawRow] = []
    size = 0
    for row in rows:
        group.append(row)
        size += _size(row.value)
        if len(group) == ROWS or size > CHARACTERS:
            yield tuple(group), size
            group, size = [], 0
    if group:
        yield tuple(group), size


def _size(value: object) -> int:
    """About the bytes that a value takes in a file."""
    if isinstance(value, str):
        return len(value) + 3
    if isinstance(value, dict):
        return sum(len(key) + 4 + _size(item) for key, item in value.items())
    return sum(map(_size, value)) if isinstance(value, list) else 6


class _Worker:
    """Reads and tokenises the rows of one task."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.tokenize = Tokenizing(plan.work)

    def __call__(self, task: _Task) -> Batch:
        part = self.plan.parts[task.part]
        if not isinstance(task.rows, Range):
            return self.tokenize(task.rows, part.form)
        if isinstance(part.place, HubSet):
            raise TypeError("a hub set has no byte ranges")
        with open_data(part.place) as handle:
            begin = max(task.rows.start, handle.tell())
            handle.seek(begin)
            size = task.rows.start + task.rows.size - begin
            rows = json_lines(handle, part.place, task.rows.line, size)
            return self.tokenize(rows, part.form)


# Set before the workers are forked, so that they share the memory of the tokenizer.
_WORKER: _Worker | None = None


def _in_worker(task: _Task) -> Batch:
    if _WORKER is None:
        raise RuntimeError("the worker was forked before its tokenizer was loaded")
    return _WORKER(task)
