"""Rounding to 4 bits in parts gives bitsandbytes' own result for the whole tensor, bit for bit."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional as bnb
from transformers import BitsAndBytesConfig

from peftcli.merge.quantized import BLOCK, PART, FourBits


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
