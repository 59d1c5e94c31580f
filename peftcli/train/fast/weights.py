"""Frozen weights as the fast step reads them: in 16 bits as they are, in 4 bits expanded when used."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_SCRATCH: dict[tuple[torch.device, torch.dtype], Tensor] = {}


class FrozenWeight:
    """The weight of one frozen linear layer, (out x in)."""

    def __init__(self, layer: nn.Module) -> None:
        self.tensor: Any = layer.weight
        self.state: Any = getattr(layer.weight, "quant_state", None)
        self.shape: torch.Size = self.state.shape if self.state else layer.weight.shape
        self.dtype: torch.dtype = self.state.dtype if self.state else layer.weight.dtype

    def get(self) -> Tensor:
        """The weight in 16 bits; of a 4-bit layer it holds until the next call of `get`."""
        if self.state is None:
            return self.tensor.detach()
        if self.tensor.is_cuda:
            from peftcli.train.fast import triton_ops

            out = _scratch(self.shape, self.dtype, self.tensor.device)
            return triton_ops.dequantize(self.tensor.data, self.state, out)
        from bitsandbytes.functional import dequantize_4bit

        expanded: Tensor = dequantize_4bit(self.tensor.data, self.state)
        return expanded


def _scratch(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One buffer for all expanded weights: they are used one after the other on one stream."""
    size = shape.numel()
    held = _SCRATCH.get((device, dtype))
    if held is None or held.numel() < size:
        held = _SCRATCH[device, dtype] = torch.empty(size, dtype=dtype, device=device)
    return held[:size].view(shape)
