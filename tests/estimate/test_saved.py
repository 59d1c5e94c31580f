"""What autograd really keeps of an adapted linear layer, against the formula's coefficients."""

from __future__ import annotations

import pytest
import torch
from allocations import saved
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from peftcli.estimate.step_model import TRL_LORA

INPUTS, OUTPUTS, RANK = 32, 48, 4


class OneLinear(PreTrainedModel):
    """The smallest model that PEFT wraps."""

    config_class = PreTrainedConfig

    def __init__(self) -> None:
        super().__init__(PreTrainedConfig())
        self.linear = nn.Linear(INPUTS, OUTPUTS, bias=False, dtype=torch.bfloat16)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.linear(values)


def kept_bytes(tokens: int, *, dora: bool, dropout: float = 0.0) -> int:
    """Bytes of all tensors that the backward pass of one layer needs, parameters left out."""
    config = LoraConfig(r=RANK, target_modules=["linear"], use_dora=dora, lora_dropout=dropout)
    model = get_peft_model(OneLinear(), config).train()
    values = torch.randn(tokens, INPUTS, dtype=torch.bfloat16, requires_grad=True)
    with saved(model.parameters()) as kept, torch.autocast("cpu", dtype=torch.bfloat16):
        model(values)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dora", [False, True])
def test_bytes_for_each_token(dora: bool) -> None:
    grown = kept_bytes(192, dora=dora) - kept_bytes(64, dora=dora)
    scaled = TRL_LORA.kept_scaled * OUTPUTS if dora else 0
    expected = TRL_LORA.kept_input * INPUTS + TRL_LORA.kept_rank * RANK + scaled
    assert grown / 128 == expected
