"""Write the result shard by shard and tensor by tensor, with a few rows in memory at a time."""

from __future__ import annotations

import errno
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from peftcli.errors import NumericalError, ResourceError
from peftcli.merge.checkpoint import NAMES
from peftcli.merge.compute import Arithmetic, Rounding, new_rows, single_threaded
from peftcli.merge.plan import Item, Plan
from peftcli.weightfiles import INDEX

COPY_BYTES = 1 << 26
SYNC_BYTES = 1 << 28
MAX_WORKERS = 8


@dataclass(frozen=True)
class Place:
    """Where an item's bytes go."""

    descriptor: int
    offset: int


@dataclass(frozen=True)
class Shard:
    """A file that is being written."""

    part: Path
    """Its name until it is complete, which no loader takes for weights."""
    descriptor: int
    futures: Mapping[Future[Rounding], Item]


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
                os.close(shard.descriptor)
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
    for file, items in plan.shards.items():
        part = folder / f"{file}.part"
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        futures: dict[Future[Rounding], Item] = {}
        opened.append(Shard(part, descriptor, futures))
        header = _header(items)
        os.posix_fallocate(descriptor, 0, len(header) + sum(item.bytes for item in items))
        os.pwrite(descriptor, header, 0)
        offset = len(header)
        for item in items:
            futures[pool.submit(_write, item, Place(descriptor, offset), arithmetic)] = item
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
        unsynced += item.bytes
        if unsynced >= SYNC_BYTES:
            os.fdatasync(shard.descriptor)
            unsynced = 0
    os.fsync(shard.descriptor)
    os.close(opened.popleft().descriptor)
    shard.part.rename(shard.part.with_suffix(""))


def _write(item: Item, place: Place, arithmetic: Arithmetic) -> Rounding:
    if item.copied and item.source.values is None:
        _copy(item, place)
        return Rounding()
    rounding, offset = Rounding(), place.offset
    for rows, part in new_rows(item, arithmetic):
        values = rows.contiguous().cpu()
        _pwrite(place.descriptor, values.view(-1).view(torch.uint8).numpy().data, offset)
        offset += values.numel() * values.element_size()
        rounding = rounding + part
    if not rounding.finite:
        raise NumericalError(
            f"{item.name}: the merged weights are not finite in {item.dtype}",
            "write them in a wider dtype: --save-dtype float32",
        )
    return rounding


def _copy(item: Item, place: Place) -> None:
    """The source's bytes, in the kernel where the file system can."""
    source = os.open(item.source.file, os.O_RDONLY)
    try:
        begin, done = item.source.begin, 0
        while done < item.bytes:
            size = min(COPY_BYTES, item.bytes - done)
            try:
                moved = os.copy_file_range(
                    source, place.descriptor, size, begin + done, place.offset + done
                )
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                data = os.pread(source, min(size, 1 << 23), begin + done)
                _pwrite(place.descriptor, memoryview(data), place.offset + done)
                moved = len(data)
            if moved == 0:
                raise OSError(errno.EIO, f"{item.source.file} became shorter")
            done += moved
    finally:
        os.close(source)


def _pwrite(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


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
    text += b" " * (-len(text) % 8)
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
    """One more than the cores, which waits for the disk; more wait for each other's caches."""
    return min(MAX_WORKERS, 1 + len(os.sched_getaffinity(0)))


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
