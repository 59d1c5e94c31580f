"""Many small tensors copied to where they are used, in one launch.

Imported on CUDA only, like `triton_ops`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _spread_kernel(
    sources, targets, sizes, columns, strides, scales, tensors, starts, like,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tensor = tl.load(tensors + program)
    at = tl.load(starts + program) + tl.arange(0, BLOCK)
    inside = at < tl.load(sizes + tensor)
    source = tl.load(sources + tensor).to(tl.pointer_type(tl.float32))
    target = tl.load(targets + tensor).to(tl.pointer_type(like.dtype.element_ty))
    values = tl.load(source + at, mask=inside) * tl.load(scales + tensor)
    width = tl.load(columns + tensor)
    row = at // width
    place = row.to(tl.int64) * tl.load(strides + tensor) + (at - row * width)
    tl.store(target + place, values.to(like.dtype.element_ty), mask=inside)


class Spread:
    """Copies float32 matrices, times a factor each, into matrices whose rows may lie apart."""

    def __init__(
        self, sources: Sequence[Tensor], targets: Sequence[Tensor], scales: Sequence[float]
    ) -> None:
        self._key = _addresses(sources)
        self._like = targets[0]
        device = self._like.device
        columns = [target.shape[-1] for target in targets]
        strides = [target.stride(0) if target.dim() > 1 else 0 for target in targets]
        starts = [range(0, source.numel(), BLOCK) for source in sources]
        self._tables = [
            torch.tensor(values, dtype=dtype, device=device)
            for values, dtype in (
                (self._key, torch.int64),
                (_addresses(targets), torch.int64),
                ([source.numel() for source in sources], torch.int32),
                (columns, torch.int32),
                (strides, torch.int64),
                (scales, torch.float32),
                ([i for i, part in enumerate(starts) for _ in part], torch.int32),
                ([start for part in starts for start in part], torch.int32),
            )
        ]

    def of(self, sources: Sequence[Tensor]) -> bool:
        """Whether the sources still lie where they lay."""
        return self._key == _addresses(sources)

    def copy(self) -> None:
        programs = len(self._tables[-1])
        _spread_kernel[(programs,)](*self._tables, self._like, BLOCK=BLOCK, num_warps=8)


def fits(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> bool:
    """Whether one launch can do it: dense float32 on CUDA, into one dtype, rows of one stride."""
    return all(
        source.is_cuda and source.dtype == torch.float32 and source.is_contiguous()
        and source.dim() <= 2 and target.stride(-1) == 1 and target.dtype == targets[0].dtype
        for source, target in zip(sources, targets, strict=True)
    )  # fmt: skip


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]
