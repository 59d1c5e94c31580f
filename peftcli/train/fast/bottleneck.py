"""Bottleneck adapters after a projection, added to it and to the stream in one function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from peftcli.methods.bottleneck_layer import BottleneckLayer
from peftcli.train.fast.lora import ADAPTER, ALIGNMENT, Shadows


@dataclass(frozen=True)
class Bottleneck:
    """y + s (act(y D' + d) U' + u), with copies of its factors in the dtype of the computation."""

    masters: list[Any]
    """D (size x width), d, U (width x size), u; biases None where it has none."""
    copies: list[Any]
    scale: float
    activation: nn.Module


class AddBottleneck(torch.autograd.Function):
    """(tokens x width) output of a projection -> the same adapted, plus the stream `x`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, adapter: Bottleneck, *_: Any) -> Tensor:
        down, down_bias, up, up_bias = adapter.copies
        narrow = y @ down.T if down_bias is None else torch.addmm(down_bias, y, down.T)
        ctx.adapter = adapter
        ctx.save_for_backward(y, narrow)
        out = (x + y).addmm_(adapter.activation(narrow), up.T, alpha=adapter.scale)
        return out if up_bias is None else out.add_(up_bias, alpha=adapter.scale)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> Any:
        y, narrow = ctx.saved_tensors
        down, down_bias, up, up_bias = ctx.adapter.copies
        scale = ctx.adapter.scale
        dz = dz.contiguous()
        with torch.enable_grad():
            narrow = narrow.detach().requires_grad_()
            active = ctx.adapter.activation(narrow)
        (dnarrow,) = torch.autograd.grad(active, narrow, (dz @ up).mul_(scale))
        found = [
            dnarrow.T @ y,
            None if down_bias is None else dnarrow.sum(0),
            *_up_gradients(dz, active.detach(), scale, bias=up_bias is not None),
        ]
        return torch.addmm(dz, dnarrow, down), dz, None, *found


def _up_gradients(
    dz: Tensor, active: Tensor, scale: float, *, bias: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the second matrix and its bias, if it has one: in one product.

    Summing the rows of dz by itself would take room for many partial sums, 128 MiB on an H100.
    """
    if not bias:
        return (dz.T @ active).mul_(scale), None
    width = active.shape[1]
    both = (dz.T @ pad(active, (0, ALIGNMENT), value=1.0)).mul_(scale)
    return both[:, :width], both[:, width]


def read_bottleneck(module: nn.Module, shadows: Shadows) -> Bottleneck | None:
    """The one adapter on a projection's output; None where a module is anything else."""
    if not fits(module):
        return None
    layer: Any = module
    down, up = layer.bottleneck_down[ADAPTER], layer.bottleneck_up[ADAPTER]
    masters = [down.weight, down.bias, up.weight, up.bias]
    base = layer.get_base_layer()
    state = getattr(base.weight, "quant_state", None)
    dtype = state.dtype if state else base.weight.dtype
    copies = [shadows.copy(master, dtype) for master in masters]
    scale = float(layer.bottleneck_config[ADAPTER].scaling)
    return Bottleneck(masters, copies, scale, layer.bottleneck_activation[ADAPTER])


def fits(module: nn.Module) -> bool:
    """Whether `read_bottleneck` can read it."""
    if not isinstance(module, BottleneckLayer) or not isinstance(module.base_layer, nn.Linear):
        return False
    config = module.bottleneck_config
    return (
        list(config) == [ADAPTER]
        and module.active_adapters == [ADAPTER]
        and config[ADAPTER].placement != "parallel"
        and not config[ADAPTER].dropout
    )
