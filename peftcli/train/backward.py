"""The backward pass in the thread that trains, and what one that failed leaves there."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch


def in_this_thread() -> AbstractContextManager[None]:
    """Go backward in this thread within.

    Another one, which PyTorch takes on a GPU, is slower to start kernels, and that is what short
    steps wait for.
    """
    return torch.autograd.set_multithreading_enabled(False)


def forget_failed() -> None:
    """Let go of the graph of a backward pass that failed in this thread.

    What it had still to run stays queued, and with it all activations below and the weights they
    are multiplied with, until the next pass begins.
    """
    torch.autograd.backward(torch.zeros((), requires_grad=True))
