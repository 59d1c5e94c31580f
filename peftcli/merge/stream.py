"""Write the result shard by shard and tensor by tensor, with a few rows in memory at a time."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from peftcli.errors import NumericalError, ResourceError
from peftcli.merge.checkpoint import NAMES
from peftcli.merge.compute import Arithmetic, Rounding, new_rows, single_threaded
from peftcli.merge.direct import PAGE, PIECE_BYTES, Memory, Output, Writer, read_pieces
from peftcli.merge.plan import Item, Plan
from peftcli.weightfiles import INDEX

SYNC_BYTES = 1 << 28
MAX_WORKERS = 8


@dataclass(frozen=True)
class Shard:
    """A file that is being written."""

    part: Path
    """Its name until it is complete, which no loader takes for weights."""
    output: Output
    futures: Mapping[Future[Rounding], Item]


class Memories(threading.local):
    """A worker's own memory, for what it reads and for what it writes."""

    def __init__(self) -> None:
        self.read, self.write = Memory(), Memory(PIECE_BYTES)


def write_weights(
    plan: Plan, folder: Path, arithmetic: Arithmetic, tell: Callable[[int, int], None]
) -> Rounding:
    """Write every shard and the index into `folder`; `tell` hears (bytes done, bytes in all).

    Raises ResourceError on a full disk and NumericalError for a result that is not finite.
    """
    total, done = Rounding(), 0
    opened: deque[Shard] = deque()
    with single_threaded(), ThreadPoolExecutor(_workers()) as pool:
        try:
            for item, rounding in _written(plan, folder, arithmetic, pool, opened):
                done += item.bytes
                total = total + rounding
                tell(done, plan.bytes)
        except OSError as error:
            raise _refused(folder, error) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            for shard in opened:
                shard.output.close()
    _write_index(plan, folder)
    return total


def _written(
    plan: Plan,
    folder: Path,
    arithmetic: Arithmetic,
    pool: ThreadPoolExecutor,
    opened: deque[Shard],
) -> Iterator[tuple[Item, Rounding]]:
    """Each item as it is done; the next shard is under way while one goes to the disk."""
    memories = Memories()
    for file, items in plan.shards.items():
        header, part = _header(items), folder / f"{file}.part"
        output = Output(part, len(header) + sum(item.bytes for item in items))
        futures: dict[Future[Rounding], Item] = {}
        opened.append(Shard(part, output, futures))
        output.write_buffered(memoryview(header), 0)
        offset = len(header)
        for item in items:
            futures[pool.submit(_write, item, output, offset, arithmetic, memories)] = item
            offset += item.bytes
        if len(opened) > 1:
            yield from _completed(opened)
    while opened:
        yield from _completed(opened)


def _completed(opened: deque[Shard]) -> Iterator[tuple[Item, Rounding]]:
    """Wait for the oldest shard; bring it to the disk bit by bit, so that little is left to do."""
    shard, unsynced = opened[0], 0
    for future in as_completed(shard.futures):
        item = shard.futures[future]
        yield item, future.result()
        unsynced += 0 if shard.output.direct else item.bytes
        if unsynced >= SYNC_BYTES:
            os.fdatasync(shard.output.descriptor)
            unsynced = 0
    os.fsync(shard.output.descriptor)
    opened.popleft().output.close()
    shard.part.rename(shard.part.with_suffix(""))


def _write(
    item: Item, output: Output, offset: int, arithmetic: Arithmetic, memories: Memories
) -> Rounding:
    rounding = Rounding()
    writer = Writer(output, offset, memories.write)
    if item.copied:
        for piece in read_pieces(item.source.file, item.source.begin, item.bytes, memories.read):
            writer.add(piece)
    else:
        for rows, part in new_rows(item, arithmetic, memories.read):
            writer.add(rows.cpu())
            rounding = rounding + part
        memories.read.shrink()
    writer.flush()
    if not rounding.finite:
        raise NumericalError(
            f"{item.name}: the merged weights are not finite in {item.dtype}",
            "write them in a wider dtype: --save-dtype float32",
        )
    return rounding


def _header(items: Sequence[Item]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for item in items:
        entries[item.name] = {
            "dtype": NAMES[item.dtype],
            "shape": list(item.shape),
            "data_offsets": [offset, offset + item.bytes],
        }
        offset += item.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    return len(text).to_bytes(8, "little") + text


def _write_index(plan: Plan, folder: Path) -> None:
    if len(plan.shards) == 1:
        (file,) = plan.shards
        (folder / file).rename(folder / "model.safetensors")
        return
    names = {item.name: file for file, items in plan.shards.items() for item in items}
    content = {"metadata": {"total_size": plan.bytes}, "weight_map": dict(sorted(names.items()))}
    (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _workers() -> int:
    """More than the cores: some of them wait for the disk."""
    return min(MAX_WORKERS, 3 + len(os.sched_getaffinity(0)))


def _refused(folder: Path, error: OSError) -> ResourceError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        with suppress(OSError):
            free = os.statvfs(folder)
            left = free.f_bavail * free.f_frsize / 2**30
            return ResourceError(
                f"{folder.parent}: the disk is full ({left:.2f} GiB free)",
                "free some space, or name another disk with --output",
            )
    return ResourceError(f"{folder}: {error.strerror or error}", "check disk and permissions")
