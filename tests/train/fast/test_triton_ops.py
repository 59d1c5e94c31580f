"""Each Triton kernel against its plain twin; on a GPU, or in Triton's interpreter on a CPU."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

from peftcli.train.fast import ops

CUDA = torch.cuda.is_available()
if not find_spec("triton") or not (CUDA or os.environ.get("TRITON_INTERPRET") == "1"):
    pytest.skip("needs a GPU, or Triton with TRITON_INTERPRET=1", allow_module_level=True)

from peftcli.train.fast import triton_ops  # noqa: E402

pytestmark = [pytest.mark.gpu] if CUDA else []
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, *([torch.bfloat16] if CUDA else [])]  # the interpreter lacks bfloat16
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    torch.manual_seed(0)
    found: torch.dtype = request.param
    return found


def near(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    wanted = wanted.double().cpu()
    distance = (found.double().cpu() - wanted).norm() / wanted.norm()
    assert distance < LIMITS[dtype]


def made(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype).to(DEVICE)


@pytest.mark.parametrize("columns", [64, 96, 2048])
def test_rms_norm_and_its_gradient(columns: int, dtype: torch.dtype) -> None:
    x, dy, skip = (made(7, columns, dtype=dtype) for _ in range(3))
    weight = (torch.rand(columns) + 0.5).to(dtype).to(DEVICE)
    plain = [t.cpu() for t in (x, weight)]
    wanted, room = torch.empty_like(plain[0]), made(7, columns + 8, dtype=dtype)
    beside = room[:, columns:].clone()
    rstd = ops.rms_norm(*plain, 1e-5, wanted)
    found_rstd = triton_ops.rms_norm(x, weight, 1e-5, room[:, :columns])
    near(room[:, :columns], wanted, dtype)
    near(found_rstd, rstd, torch.float32)
    assert torch.equal(room[:, columns:], beside)
    for other in (None, skip):
        rest = None if other is None else other.cpu()
        grad = ops.rms_norm_backward(dy.cpu(), *plain, rstd, rest)
        near(triton_ops.rms_norm_backward(dy.clone(), x, weight, found_rstd, other), grad, dtype)


@pytest.mark.parametrize("columns", [24, 2500])
def test_swiglu_and_its_gradient(columns: int, dtype: torch.dtype) -> None:
    both = made(5, 2 * columns + 8, dtype=dtype)[:, : 2 * columns]
    dh = made(5, columns, dtype=dtype)
    room, wanted = made(5, columns + 8, dtype=dtype), torch.empty(5, columns, dtype=dtype)
    triton_ops.swiglu(both, room[:, :columns])
    ops.swiglu(both.cpu(), wanted)
    near(room[:, :columns], wanted, dtype)
    plain = both.cpu().clone(), dh.cpu().clone()
    ops.swiglu_backward(plain[1], plain[0])
    triton_ops.swiglu_backward(dh, both)
    near(dh, plain[1], dtype)
    near(both, plain[0], dtype)


@pytest.mark.parametrize(("heads", "width"), [(3, 16), (8, 128), (1, 80)])
@pytest.mark.parametrize("sign", [1, -1])
def test_rope(heads: int, width: int, sign: int, dtype: torch.dtype) -> None:
    states = made(6, heads, width, dtype=dtype)
    angles = torch.randn(6, width // 2).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    wanted, room = torch.empty_like(states.cpu()), made(6, 2 * heads, width, dtype=dtype)
    ops.rope(states.cpu(), cos, sin, sign, wanted)
    triton_ops.rope(states, cos.to(DEVICE), sin.to(DEVICE), sign, room[:, :heads])
    near(room[:, :heads], wanted, dtype)
    triton_ops.rope(states, cos.to(DEVICE), sin.to(DEVICE), sign, states)
    near(states, wanted, dtype)


@pytest.mark.parametrize("columns", [50, 5000])
def test_cross_entropy_and_its_gradient(columns: int, dtype: torch.dtype) -> None:
    logits = made(4, columns, dtype=dtype) * 3
    targets = torch.randint(0, columns, (4,))
    scale = torch.tensor(0.25)
    plain = logits.cpu().clone()
    near(triton_ops.cross_entropy_(logits, targets.to(DEVICE), None),
         ops.cross_entropy_(plain, targets, None), torch.float32)  # fmt: skip
    assert torch.equal(logits.cpu(), plain)
    wanted = ops.cross_entropy_(plain, targets, scale)
    found = triton_ops.cross_entropy_(logits, targets.to(DEVICE), scale.to(DEVICE))
    near(found, wanted, torch.float32)
    near(logits, plain, dtype)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bit_weights_expand_to_bitsandbytes_own_values(kind: str, double: bool) -> None:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    torch.manual_seed(0)
    dtype = torch.bfloat16 if CUDA else torch.float32
    weight = torch.randn(96, 1024).to(dtype).to(DEVICE)
    packed, state = quantize_4bit(weight, quant_type=kind, compress_statistics=double)
    wanted = dequantize_4bit(packed, state)
    room = torch.full((96, 1040), torch.nan, dtype=dtype, device=DEVICE)
    triton_ops.dequantize(packed, state, room[:, :1024])
    torch.testing.assert_close(room[:, :1024], wanted, rtol=4e-3 if CUDA else 1e-6, atol=1e-6)
    assert room[:, 1024:].isnan().all()
