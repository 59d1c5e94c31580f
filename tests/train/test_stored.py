"""Adapters on checkpoints that are quantised already, held as they are stored."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from bitsandbytes.nn import Linear4bit
from transformers import BitsAndBytesConfig
from transformers.integrations.finegrained_fp8 import FP8Linear

from peftcli.events import Event, Note, Step
from peftcli.models import Device, load_base
from peftcli.recipe.document import Document
from peftcli.recipe.load import validate
from peftcli.recipe.schema import Model
from peftcli.train.fast.lora import Unsupported, check
from peftcli.train.run import Options, run

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
STORED = {
    "4 bits": (NF4, "float32", "fused layers"),
    "4 bits of bfloat16": (
        NF4,
        "bfloat16",
        "plain layers: fused ones leave out a base in bfloat16",
    ),
    "8 bits": (
        {"load_in_8bit": True},
        "float32",
        "plain layers: fused ones leave out Linear8bitLt",
    ),
}


@pytest.mark.parametrize(("bits", "dtype", "kernels"), STORED.values(), ids=STORED)
@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_an_adapter_learns_on_a_stored_base(
    base_model: Path,
    rows: Path,
    tmp_path: Path,
    bits: dict[str, object],
    dtype: str,
    kernels: str,
    method: str,
) -> None:
    stored, device = tmp_path / "stored", Device("cpu", dtype, "CPU", None)
    shutil.copytree(base_model, stored, ignore=shutil.ignore_patterns("*.safetensors"))
    load_base(Model(name=str(base_model)), device, BitsAndBytesConfig(**bits)).save_pretrained(
        stored
    )
    values = {
        "model": str(stored),
        "method": method,
        "data": {"train": str(rows), "max_length": 64},
        "training": {"max_steps": 8, "batch_size": 8, "learning_rate": 1e-2, "device": "cpu"},
        "output": str(tmp_path / "run"),
    }
    events: list[Event] = []
    run(validate(Document("test.yaml", values)), Options(), events.append)
    losses = [event.loss for event in events if isinstance(event, Step)]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    notes = [event.text for event in events if isinstance(event, Note)]
    assert any(note.startswith(kernels) for note in notes), notes


def test_linears_whose_weights_are_codes_are_left_to_themselves() -> None:
    """Without their scales the codes would be taken for the weights."""
    with pytest.raises(Unsupported, match="FP8Linear layers"):
        check([FP8Linear(32, 32, block_size=(16, 16)).requires_grad_(False)])


@pytest.mark.parametrize(
    ("inputs", "blocksizes", "reason"),
    [
        (12, (64, 64), "4-bit layers of 12 inputs"),
        (64, (64, 128), "groups of 4-bit layers of several kinds"),
    ],
)
def test_four_bits_that_one_launch_does_not_expand_are_left_to_bitsandbytes(
    inputs: int, blocksizes: tuple[int, int], reason: str
) -> None:
    """A launch would put values into the wrong row, or take the wrong scales."""
    layers = [Linear4bit(inputs, 16, bias=False) for _ in blocksizes]
    for layer, blocksize in zip(layers, blocksizes, strict=True):
        layer.weight.blocksize = blocksize
        layer.requires_grad_(False).to("cpu")  # which quantises it
    with pytest.raises(Unsupported, match=reason):
        check(list(layers))
