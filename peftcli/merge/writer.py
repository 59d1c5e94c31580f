"""One thread that writes what others compute, so that a slow disk does not stop their work."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from threading import BoundedSemaphore

import torch

WAITING_BYTES = 1 << 27
"""What may wait for the disk at once; a single larger piece waits alone."""
UNIT_BYTES = 1 << 17


class Writer:
    """Writes tensors at places of files, in the order they come."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._units = WAITING_BYTES // UNIT_BYTES
        self._room = BoundedSemaphore(self._units)
        self._turn = BoundedSemaphore(1)

    def write(self, descriptor: int, values: torch.Tensor, offset: int) -> Future[None]:
        """Write a contiguous CPU tensor's bytes; waits while too much is on its way.

        The future raises OSError when the disk refuses.
        """
        size = values.numel() * values.element_size()
        units = min(self._units, max(1, -(-size // UNIT_BYTES)))
        with self._turn:  # one at a time, or two large pieces would wait for each other's units
            for _ in range(units):
                self._room.acquire()
        return self._pool.submit(self._write, descriptor, values, offset, units)

    def _write(self, descriptor: int, values: torch.Tensor, offset: int, units: int) -> None:
        try:
            write_all(descriptor, values.view(-1).view(torch.uint8).numpy().data, offset)
        finally:
            self._room.release(units)

    def close(self) -> None:
        """Wait for what is being written, and leave the rest."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of `data`, however little the system takes at once."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)
