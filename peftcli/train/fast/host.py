"""Tensors that wait in host memory, and the way there and back beside the GPU's other work.

The copies run on a stream of their own, and nobody waits for them on the host: the GPU's main
stream waits for the event of a copy where it needs what was copied, or the memory it came from.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 2**24
"""Bytes of a piece of host memory: a power of two, for PyTorch rounds pinned memory up to one."""


@dataclass(frozen=True)
class Stored:
    """A tensor in host memory, cut into blocks."""

    blocks: list[Tensor]
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class Host:
    """Pinned memory, which is slow to make and so used again, and the stream of the copies.

    On a CPU the memory is not pinned, and a copy is done when the call returns.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._stream: torch.cuda.Stream | None = None

    def store(self, x: Tensor) -> tuple[Stored, torch.cuda.Event | None]:
        """Begin to copy; `x`, whose values lie end to end, must stay until the event has come."""
        parts = _bytes(x).split(BLOCK)
        blocks = [self._free.pop() if self._free else _block(x.device) for _ in parts]
        with self._beside(x.device):
            for block, part in zip(blocks, parts, strict=True):
                block[: len(part)].copy_(part, non_blocking=True)
        return Stored(blocks, x.shape, x.dtype, x.device), self._event()

    def fetch(self, stored: Stored) -> tuple[Tensor, torch.cuda.Event | None]:
        """Begin to copy back; the tensor is whole once the event was waited for.

        The blocks may be written again at once: by a copy, which comes later on the same stream.
        """
        x = torch.empty(stored.shape, dtype=stored.dtype, device=stored.device)
        with self._beside(x.device):
            for block, part in zip(stored.blocks, _bytes(x).split(BLOCK), strict=True):
                part.copy_(block[: len(part)], non_blocking=True)
        self._free += stored.blocks
        return x, self._event()

    @contextmanager
    def _beside(self, device: torch.device) -> Iterator[None]:
        """On the stream of the copies, after all that the main stream was given until now."""
        if device.type != "cuda":
            yield
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            yield

    def _event(self) -> torch.cuda.Event | None:
        return None if self._stream is None else self._stream.record_event()


def wait_for(event: torch.cuda.Event | None) -> None:
    """Let the main stream go on after a copy; the host goes on at once."""
    if event is not None:
        torch.cuda.current_stream().wait_event(event)


def forget_pinned() -> None:
    """Give the machine back what PyTorch holds of pinned memory that nobody uses."""
    torch._C._host_emptyCache()  # torch.accelerator.empty_host_cache, before PyTorch had that


def _bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)


def _block(device: torch.device) -> Tensor:
    return torch.empty(BLOCK, dtype=torch.uint8, pin_memory=device.type == "cuda")
