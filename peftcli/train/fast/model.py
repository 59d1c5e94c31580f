"""A causal language model whose training step runs on the fused functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftcli.recipe.checks import FUSED
from peftcli.train.fast import layers
from peftcli.train.fast.blocks import NormRows
from peftcli.train.fast.fp8 import Fp8
from peftcli.train.fast.lora import Shadows, Unsupported
from peftcli.train.fast.loss import HeadLoss


@dataclass(frozen=True)
class FastModel:
    """The parts of a model that the fast step calls."""

    body: nn.Module
    """Embeddings to last norm."""
    head: Tensor
    """(vocabulary x hidden), frozen."""
    shadows: Shadows

    def refresh(self) -> None:
        """Take over the optimizer's last step; before every step and every evaluation."""
        self.shadows.refresh()

    def loss(self, batch: Mapping[str, Any], scale: Tensor) -> Tensor:
        """Sum of the losses of a micro-batch's trained tokens, times `scale`."""
        hidden = self.body(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            cu_seq_lens_q=batch.get("cu_seq_lens"),
            max_length_q=batch["longest"],
            use_cache=False,
        ).last_hidden_state
        loss: Tensor = HeadLoss.apply(
            hidden.flatten(0, 1), self.head, batch["trained"], batch["targets"], scale
        )
        return loss


def accelerate(
    model: PreTrainedModel | PeftModel,
    checkpointing: bool = False,
    *,
    offload: bool = False,
    lowest: int | None = None,
    fp8: bool = False,
    dtype: torch.dtype | None = None,
) -> FastModel:
    """Put the fused functions into `model`; raises Unsupported, changing nothing, where it cannot.

    The model's own forward pass is gone afterwards: it is for training and for held-out loss. With
    `offload`, what `checkpointing` keeps of the layers waits in host memory; with `lowest`, it is
    of that many layers only. With `fp8` the weights of its layers are turned into 8 bits, layer by
    layer. With `dtype`, in which the run computes, a base in another one is left out.
    """
    causal: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    config = causal.config
    if config.model_type not in FUSED:
        raise Unsupported(f"{config.model_type} models")
    head = causal.lm_head
    if not isinstance(head, nn.Linear) or head.bias is not None or head.weight.requires_grad:
        raise Unsupported("a trained or unusual output head")
    if causal.dtype == torch.float16:
        raise Unsupported("float16")
    if dtype is not None and head.weight.dtype != dtype:  # as a quantised checkpoint brought it
        raise Unsupported(f"a base in {str(head.weight.dtype).removeprefix('torch.')}")
    shadows = Shadows(Fp8) if fp8 else Shadows()
    norm = layers.read_norm(causal.model.norm)
    layers.install(list(causal.model.layers), shadows, checkpointing, offload, lowest)
    if fp8 and head.weight.is_cuda:
        torch.cuda.empty_cache()  # the 16-bit weights leave gaps that activations do not fill

    def forward(_: nn.Module, x: Tensor) -> Tensor:
        normed: Tensor = NormRows.apply(x, norm)
        return normed

    causal.model.norm.forward = MethodType(forward, causal.model.norm)
    shadows.refresh()
    return FastModel(causal.model, head.weight.detach(), shadows)
