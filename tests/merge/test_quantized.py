"""Rounding to 4 bits in parts gives bitsandbytes' own result for the whole tensor, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes import functional as bnb
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from peftcli.merge.blocks import BLOCK
from peftcli.merge.compute import CPU_ELEMENTS
from peftcli.merge.options import MergeOptions
from peftcli.merge.quantized import PART, FourBits
from peftcli.merge.run import run


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(
    ("kind", "dtype", "shape"),
    [
        ("nf4", torch.bfloat16, (2 * PART // 512 + 3, 512)),
        ("fp4", torch.float32, (PART // 1024 + 1, 1024)),
        ("nf4", torch.float16, (5, 72)),  # the last block is not full
    ],
)
def test_round_trip(
    kind: str, dtype: torch.dtype, shape: tuple[int, int], double: bool, transposed: bool
) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(shape) * torch.rand(shape[0], 1)).to(dtype)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double
    )
    values = weight.T.contiguous() if transposed else weight
    codes, state = bnb.quantize_4bit(
        values, blocksize=BLOCK, compress_statistics=double, quant_type=kind
    )
    expected = bnb.dequantize_4bit(codes, state)
    found = FourBits(config, dtype).round_trip(weight, transposed=transposed)
    assert torch.equal(found, expected.T if transposed else expected)
    assert not torch.equal(found, weight)
    assert found.is_contiguous()


def test_merge_of_a_rounded_base(tmp_path: Path) -> None:
    """Each linear of the result is bitsandbytes' rounding of the whole tensor, and the update."""
    torch.manual_seed(0)
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "output"
    shape = LlamaConfig(
        hidden_size=512, intermediate_size=1376, num_hidden_layers=1, vocab_size=64
    )  # more values than are worked on at once
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    model.save_pretrained(base)
    before = {name: values.clone() for name, values in model.state_dict().items()}
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    tuned = get_peft_model(model, lora)
    for name, values in tuned.named_parameters():
        if "lora_" in name:  # products without rounding, whatever the order of their sums
            values.data = values.sign() / 64
    tuned.save_pretrained(str(adapter))
    options = MergeOptions(
        output=output,
        base_model=str(base),
        base="dequantized",
        save_dtype="float32",
        verify=False,
    )
    assert run(adapter, options, lambda text: None).base.tensors_dequantized == 7
    factors = load_file(adapter / "adapter_model.safetensors")
    merged = load_file(output / "model.safetensors")
    linears = [name for name in merged if name.removesuffix(".weight").endswith("_proj")]
    assert len(linears) == 7
    assert max(before[name].numel() for name in linears) > CPU_ELEMENTS
    for name in linears:
        codes, state = bnb.quantize_4bit(
            before[name].view(-1),  # as rows, bitsandbytes misreads 1376 columns on a CPU
            blocksize=BLOCK,
            compress_statistics=True,
            quant_type="nf4",
        )
        rounded = bnb.dequantize_4bit(codes, state).float().view_as(before[name])
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        update = (factors[f"{key}B.weight"] @ factors[f"{key}A.weight"]) * 2.0
        assert torch.equal(merged[name], rounded + update), name
