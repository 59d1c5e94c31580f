"""Rounding to 4 bits in blocks, part by part: bitsandbytes' own result for the whole tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from bitsandbytes import functional as bnb

from peftcli.merge.direct import Memory

BLOCK = 64  # bitsandbytes' own block size
SCALES_BLOCK = 256  # and that of the scales, under double quantisation


def round_parts(
    parts: Iterable[torch.Tensor], count: int, kind: str, *, double: bool
) -> Iterator[torch.Tensor]:
    """The parts of a weight of `count` values after quantising (nf4, fp4) and expanding.

    Of whole blocks, but for the last; one may lie in memory that the next one takes. All are
    quantised before the first is expanded, because under double quantisation each scale depends
    on all. Until then a value takes 4 bits and its share of the scales.
    """
    codes, scales = Store(-(-count // 2)), Store(4 * -(-count // BLOCK))
    forms: list[tuple[tuple[int, ...], torch.dtype]] = []
    for part in parts:
        packed, state = bnb.quantize_4bit(part.reshape(-1), blocksize=BLOCK, quant_type=kind)
        codes.add(packed.view(-1))
        scales.add(state.absmax)
        forms.append((tuple(part.shape), part.dtype))
    made = scales.bytes.view(torch.float32)
    held = _rounded(made) if double else made
    begin = 0
    for shape, dtype in forms:
        end = begin + math.prod(shape)
        state = bnb.QuantState(
            held[begin // BLOCK : -(-end // BLOCK)],
            shape=torch.Size((end - begin,)),
            dtype=dtype,
            blocksize=BLOCK,
            quant_type=kind,
        )
        packed = codes.bytes[begin // 2 : -(-end // 2)].view(-1, 1)
        yield bnb.dequantize_4bit(packed, state).view(shape)
        begin = end


def _rounded(scales: torch.Tensor) -> torch.Tensor:
    """The scales of all blocks as the run held them under double quantisation: in 8 bits."""
    offset = scales.mean()
    codes, state = bnb.quantize_blockwise(scales - offset, blocksize=SCALES_BLOCK)
    expanded: torch.Tensor = bnb.dequantize_blockwise(codes, state) + offset
    return expanded.float()


class Store:
    """Tensors copied one behind the other, on a CPU into memory that is no allocator's.

    There, a small one that stays where large ones come and go keeps the memory around it from
    being used again: many times its own size, and how many differs from run to run.
    """

    def __init__(self, size: int) -> None:
        self._size, self._filled = size, 0
        self._memory = torch.empty(0, dtype=torch.uint8)

    def add(self, tensor: torch.Tensor) -> None:
        """Flat, and on the device of the others."""
        if not self._filled:
            self._memory = _memory(self._size, tensor.device)
        end = self._filled + tensor.nbytes
        self._memory[self._filled : end].copy_(tensor.view(torch.uint8))
        self._filled = end

    @property
    def bytes(self) -> torch.Tensor:
        """All that was copied."""
        return self._memory[: self._filled]


def _memory(size: int, device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return Memory(size).bytes
    return torch.empty(size, dtype=torch.uint8, device=device)
