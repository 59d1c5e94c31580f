"""Checkpointed layers whose inputs wait for the backward pass in host memory.

A layer's input is there while nobody is near: it leaves the GPU during the layer's own forward pass
and the next one's, and comes back during the backward pass of the layer above. So the GPU holds two
of them at any time, however many layers there are; the inputs of the last two never leave.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from peftcli.train.fast.again import computing_again
from peftcli.train.fast.host import Host, Stored, wait_for

STAY = 2
"""Inputs of layers that are on the GPU at a time, and the last layers whose inputs stay there."""

Layer = Callable[..., Tensor]


class Offloading:
    """The inputs of a model's layers, between a forward and its backward pass."""

    def __init__(self, layers: int) -> None:
        self._host = Host()
        self._layers = layers
        self._last: _Input | None = None

    def runner(self, index: int, module: nn.Module) -> Callable[..., Tensor]:
        """What runs that layer: called with its forward function, its input and the options."""
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        return partial(self._run, index, trained)

    def _run(
        self, index: int, trained: list[nn.Parameter], layer: Layer, x: Tensor, **options: Any
    ) -> Tensor:
        if index == 0:
            self._last = None  # of a forward pass before
        if not (x.requires_grad or trained):  # below the lowest adapter
            return layer(x, **options)
        kept = _Input(self._host, x.detach().contiguous(), self._last)
        if kept.below is not None and kept.below.below is not None:
            kept.below.below.leave()
        if index < self._layers - STAY:
            kept.store()
        self._last = kept
        call = _Call(partial(layer, **options), trained, kept)
        y: Tensor = _Again.apply(x, call, *trained)
        return y


class _Input:
    """The input of a layer, on the GPU, in host memory, or on its way."""

    def __init__(self, host: Host, x: Tensor, below: _Input | None) -> None:
        self.below = below
        """That of the layer before, if it is kept too."""
        self._host = host
        self._here: Tensor | None = x
        self._stored: Stored | None = None
        self._copied: torch.cuda.Event | None = None

    def store(self) -> None:
        """Begin to copy it to host memory."""
        if self._here is not None:
            self._stored, self._copied = self._host.store(self._here)

    def leave(self) -> None:
        """Free the GPU's memory, if it was stored; the main stream waits for the copy."""
        if self._stored is not None:
            wait_for(self._copied)
            self._here = None

    def fetch(self) -> None:
        """Begin to copy it back, if it has left."""
        if self._here is None and self._stored is not None:
            self._here, self._copied = self._host.fetch(self._stored)
            self._stored = None

    def take(self) -> Tensor:
        """It itself, for the last time."""
        self.fetch()
        if self.below is not None:
            self.below.fetch()  # while this layer goes backward
        wait_for(self._copied)
        x, self._here, self.below = self._here, None, None
        assert x is not None  # each is taken once
        return x


@dataclass(frozen=True)
class _Call:
    """A layer with all its arguments but the input."""

    run: Layer
    trained: list[nn.Parameter]
    kept: _Input


class _Again(torch.autograd.Function):
    """Runs a layer and keeps nothing but its input; runs it again to go backward.

    The trained parameters are arguments so that the output needs a gradient even where the input,
    of the lowest layer with an adapter, needs none.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: _Call, *_: Tensor) -> Tensor:
        ctx.call, kind = call, x.device.type
        ctx.precision = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        return call.run(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        call: _Call | None = ctx.call
        if call is None:
            raise RuntimeError("a layer whose input was offloaded can go backward once only")
        ctx.call = None
        needs_input = ctx.needs_input_grad[0]
        x = call.kept.take().requires_grad_(needs_input)
        with torch.enable_grad(), computing_again(), torch.autocast(*ctx.precision):
            end = get_gradient_edge(call.run(x))  # the output itself is read by nobody
        inputs = [*([x] if needs_input else []), *call.trained]
        found = torch.autograd.grad(end, inputs, dy, allow_unused=True)
        dx = found[0] if needs_input else None
        return dx, None, *found[len(found) - len(call.trained) :]
