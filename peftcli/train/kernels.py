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
    model: PreTrainedModel | PeftModel, checkpointing: bool, *, fp8: bool = False
) -> tuple[FastModel | None, str]:
    """The model on fused functions, or None; and a line that says so, or why not.

    Raises UsageError where the base was to be in fp8, which plain layers cannot hold.
    """
    try:
        fast = accelerate(model, checkpointing, fp8=fp8)
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
        return None, f"plain layers: fused ones leave out {reason}"
    return fast, f"fused layers and loss{', the base in fp8' if fp8 else ''}"
