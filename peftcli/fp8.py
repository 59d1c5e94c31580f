"""Matrices in 8 bits: codes in e4m3, and one float32 scale a row that takes its largest to 448.

The format: Micikevicius et al., 2022, arXiv 2209.05433. What training holds, and what merging and
evaluating then take for the base, is rounded here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
FLOOR = 1e-30  # a row of zeros gets a scale too; gradients are far above it
LINEARS = (
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"),
    *("gate_proj", "up_proj", "gate_up_proj", "down_proj"),
)
PART = 1 << 24  # values that are worked on in float32 at once


def quantize_rows(x: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(rows x columns), times a factor for each column -> codes, and scales (rows x 1)."""
    wide = x.float() if factor is None else x.float() * factor
    highest = wide.abs().amax(-1, keepdim=True).clamp(min=FLOOR)
    # Divided by a number, a GPU multiplies by its inverse: so do all, for the same last bit.
    return (wide * (LARGEST / highest)).to(DTYPE), highest * (1 / LARGEST)


def quantize_weight(weight: Tensor, codes: Tensor, scales: Tensor) -> None:
    """A weight into codes and scales that exist already, a few rows at a time."""
    rows = max(1, PART // weight.shape[1])
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        codes[part], scales[part] = quantize_rows(weight[part])


@torch.no_grad()
def round_trip(weight: Tensor) -> Tensor:
    """What a weight is after quantising, in float32."""
    rounded = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    rows = max(1, PART // weight.shape[1])
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        codes, scales = quantize_rows(weight[part])
        torch.mul(codes.float(), scales, out=rounded[part])
    return rounded


def frozen_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linears of the decoder layers, which are what a run with an fp8 base quantises."""
    for name, module in model.named_modules():
        own = name.removesuffix(".base_layer").rpartition(".")[2]
        if isinstance(module, nn.Linear) and own in LINEARS:
            yield name, module


@torch.no_grad()
def round_base(model: nn.Module) -> None:
    """Replace the weights of a 16-bit base by those that a run with an fp8 base computes with."""
    for _, module in frozen_linears(model):
        module.weight.copy_(round_trip(module.weight))
