"""A checkpointed layer computed again for its backward pass: only what that reads is worth it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint

_AGAIN = ContextVar("again", default=False)


def run_checkpointed(layer: Callable[..., Tensor], x: Tensor, **options: Any) -> Tensor:
    """`layer(x)`, of which nothing but `x` is kept; the layer runs `again` when it is needed."""
    made: Tensor = checkpoint(layer, x, use_reentrant=False, context_fn=_contexts, **options)
    return made


def again() -> bool:
    """Whether what is kept for the backward pass is all that anybody reads.

    PyTorch stops a layer that is computed again as soon as its last function has kept its tensors,
    so the output of that function is never seen; `offload` runs the layer to its end, and does not
    look at it.
    """
    return _AGAIN.get()


def unread(like: Tensor) -> Tensor:
    """In place of an output that nobody reads: its shape, and the memory of one value."""
    return like.new_empty(1).expand_as(like)


@contextmanager
def computing_again() -> Iterator[None]:
    """Let `again` be true within."""
    token = _AGAIN.set(True)
    try:
        yield
    finally:
        _AGAIN.reset(token)


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), computing_again()
