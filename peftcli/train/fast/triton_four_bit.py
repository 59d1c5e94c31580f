"""4-bit weights of a group expanded in one launch, with the factors that lie beside or below.

Imported on CUDA only, like `triton_ops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

WORDS = 1024  # of 8 values, that a program expands


@triton.jit
def _expand_kernel(
    weights, which, out, columns, stride, programs,
    source, target, source_rows, source_columns, source_stride,
    NESTED: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED_SIZE: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < programs:
        # Of each weight: codes, their values, scales, `_parts`' last three; words, row, program.
        start = weights + tl.load(which + program) * 9
        packed = tl.load(start).to(tl.pointer_type(tl.int32))
        code = tl.load(start + 1).to(tl.pointer_type(tl.float32))
        words, first_row = tl.load(start + 6).to(tl.int32), tl.load(start + 7)
        word = (program - tl.load(start + 8).to(tl.int32)) * WORDS + tl.arange(0, WORDS)
        inside = word < words
        bits = tl.load(packed + word, mask=inside, other=0)
        block = word // (BLOCKSIZE // 8)
        if NESTED:
            absmax = tl.load(start + 2).to(tl.pointer_type(tl.uint8))
            nested_code = tl.load(start + 3).to(tl.pointer_type(tl.float32))
            nested_absmax = tl.load(start + 4).to(tl.pointer_type(tl.float32))
            index = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
            scale = tl.load(nested_code + index) * tl.load(
                nested_absmax + block // NESTED_SIZE, mask=inside, other=0.0
            )
            scale += tl.load(tl.load(start + 5).to(tl.pointer_type(tl.float32)))
        else:
            absmax = tl.load(start + 2).to(tl.pointer_type(tl.float32))
            scale = tl.load(absmax + block, mask=inside, other=0.0)
        element = tl.arange(0, 8)
        shift = 8 * (element // 2) + 4 * (1 - element % 2)  # the high half of a byte comes first
        nibble = (bits[:, None] >> shift[None, :]) & 15
        value = tl.load(code + nibble) * scale[:, None]
        row = word * 8 // columns
        place = (row + first_row) * stride + (word * 8 - row * columns)
        at = place[:, None] + element[None, :]
        tl.store(out + at, value.to(out.dtype.element_ty), mask=inside[:, None])
    else:
        # Names of its own: a variable has one type in both branches.
        item = (program - programs) * (8 * WORDS) + tl.arange(0, 8 * WORDS)
        line = item // source_columns
        column = item - line * source_columns
        known = line < source_rows
        copied = tl.load(source + line.to(tl.int64) * source_stride + column, mask=known)
        tl.store(target + line.to(tl.int64) * stride + column, copied, mask=known)


class Expansion:
    """Weights of bitsandbytes in 4 bits, one below the other, of the same kind and columns.

    Holds the addresses of their codes and scales, which must stay where they are. Columns are a
    multiple of 8.
    """

    def __init__(self, weights: Sequence[Any]) -> None:
        state = weights[0].quant_state
        self.columns: int = state.shape[1]
        self._kind = (
            state.nested, state.blocksize, state.state2.blocksize if state.nested else 1,
        )  # fmt: skip
        self._held = [_parts(weight) for weight in weights]
        table: list[list[int]] = []
        which: list[int] = []
        row = 0
        for index, (weight, held) in enumerate(zip(weights, self._held, strict=True)):
            words = weight.quant_state.shape.numel() // 8
            table.append([*(part.data_ptr() for part in held), words, row, len(which)])
            which += [index] * triton.cdiv(words, WORDS)
            row += weight.quant_state.shape[0]
        device = weights[0].device
        self._table = torch.tensor(table, dtype=torch.int64, device=device)
        self._which = torch.tensor(which, dtype=torch.int32, device=device)

    def into(self, out: Tensor, copy: tuple[Tensor, Tensor] | None) -> None:
        """Write the weights into `out`, and copy a matrix to its place in another part of `out`'s.

        Rows may lie apart, those of `out` and of that place equally far.
        """
        programs = len(self._which)
        source, target = copy or (out, out)  # which no program reads
        copied = 0 if copy is None else triton.cdiv(source.numel(), 8 * WORDS)
        nested, blocksize, nested_size = self._kind
        _expand_kernel[(programs + copied,)](
            self._table, self._which, out, self.columns, out.stride(0), programs,
            source, target, *source.shape, source.stride(0),
            NESTED=nested, BLOCKSIZE=blocksize, NESTED_SIZE=nested_size, WORDS=WORDS, num_warps=8,
        )  # fmt: skip


def _parts(weight: Any) -> list[Tensor]:
    """Codes, their values, scales; the values, scales and offset of the scales if they have any."""
    state: Any = weight.quant_state
    if not state.nested:
        return [weight.data, state.code, state.absmax, *[state.code] * 3]
    inner = state.state2
    return [weight.data, state.code, state.absmax, inner.code, inner.absmax, state.offset]
