"""Which of PyTorch's own attention kernels run, and which steps run on the fused functions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from peftcli.errors import ResourceError, UsageError
from peftcli.train.fast.lora import Unsupported
from peftcli.train.fast.model import FastModel, accelerate

# cuDNN's is the fastest one on full-length rows where it runs (Hopper and later).
ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@contextmanager
def attention_kernels() -> Iterator[None]:
    """Prefer the fastest kernel for every call of SDPA within."""
    with sdpa_kernel(ORDER, set_priority=True):
        yield


def fast_model(
    model: PreTrainedModel | PeftModel,
    checkpointing: bool,
    *,
    offload: bool = False,
    lowest: int | None = None,
    fp8: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[FastModel | None, str]:
    """The model on fused functions, or None; and a line that says so, or why not.

    Raises UsageError where the base was to be in fp8, inputs of layers in host memory, or the
    `lowest` layers alone checkpointed, which plain layers cannot do.
    """
    try:
        fast = accelerate(
            model, checkpointing, offload=offload, lowest=lowest, fp8=fp8, dtype=dtype
        )
    except torch.OutOfMemoryError:
        raise ResourceError(
            "method.quantization: fp8: the base loads in 16 bits, and the GPU cannot hold those",
            "write `name: qlora`, which loads in 4 bits, or use a larger GPU",
        ) from None
    except Unsupported as reason:
        if fp8:
            raise UsageError(
                f"method.quantization: fp8 runs on fused layers, which leave out {reason}",
                "remove it, or what they leave out",
            ) from None
        if offload or lowest is not None:
            raise cannot_checkpoint(lowest, f"which leave out {reason}") from None
        return None, f"plain layers: fused ones leave out {reason}"
    base = ", the base in fp8" if fp8 else ""
    inputs = ", the layers' inputs in host memory" if offload else ""
    return fast, f"fused layers and loss{base}{inputs}"


def cannot_checkpoint(lowest: int | None, why: str) -> UsageError:
    """The error of layers that keep their plain forward pass; without `lowest` it is offload."""
    what = "offload" if lowest is None else lowest
    return UsageError(f"training.checkpointing: {what} runs on fused layers, {why}", "write `full`")
