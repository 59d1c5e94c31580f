"""Which of PyTorch's own attention kernels run, and which steps run on the fused functions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

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
    model: PreTrainedModel | PeftModel, checkpointing: bool
) -> tuple[FastModel | None, str]:
    """The model on fused functions, or None; and a line that says so, or why not."""
    try:
        return accelerate(model, checkpointing), "fused layers and loss"
    except Unsupported as reason:
        return None, f"plain layers: fused ones leave out {reason}"
