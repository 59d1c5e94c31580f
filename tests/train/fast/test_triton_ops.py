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

from peftcli import fp8  # noqa: E402
from peftcli.train.fast import (  # noqa: E402
    triton_four_bit,
    triton_fp8,
    triton_gated,
    triton_heads,
    triton_ops,
    triton_products,
    triton_spread,
)

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


@pytest.mark.parametrize(
    ("heads", "shared", "width", "turned"),
    [(3, 1, 16, 16), (8, 2, 128, 128), (1, 1, 80, 80), (3, 1, 128, 96), (4, 2, 64, 16)],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_rope(
    heads: int, shared: int, width: int, turned: int, sign: int, dtype: torch.dtype
) -> None:
    sizes = [heads, shared, shared]
    states = [made(6, size, width, dtype=dtype) for size in sizes]
    angles = torch.randn(6, turned // 2).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    there = cos.to(DEVICE), sin.to(DEVICE)
    plain = [x.cpu() for x in states]
    wanted = [torch.empty_like(x) for x in plain]
    ops.rope(plain, cos, sin, sign, wanted)
    assert torch.equal(wanted[2], plain[2])
    assert torch.equal(wanted[0][..., turned:], plain[0][..., turned:])
    room = made(6, heads + 2 * shared + 1, width, dtype=dtype)
    parts = list(room.split([*sizes, 1], 1))
    rest = parts.pop().clone()
    triton_ops.rope(states, *there, sign, parts)
    for part, plain_part in zip(parts, wanted, strict=True):
        near(part, plain_part, dtype)
    assert torch.equal(room[:, -1:], rest)
    triton_ops.rope(states[:2], *there, sign, states[:2])  # in place
    for part, plain_part in zip(states[:2], wanted, strict=False):
        near(part, plain_part, dtype)
    assert torch.equal(states[2].cpu(), plain[2])


@pytest.mark.parametrize(("heads", "shared", "width"), [(3, 1, 16), (8, 2, 128), (1, 1, 80)])
def test_rope_after_head_norms_and_its_gradient(
    heads: int, shared: int, width: int, dtype: torch.dtype
) -> None:
    sizes = [heads, shared, shared, 1]  # what lies beside queries, keys and values comes last

    def places() -> tuple[torch.Tensor, list[torch.Tensor]]:
        room = made(6, sum(sizes), width, dtype=dtype)
        return room, list(room.split(sizes, 1)[:3])

    (y, raw), (turned, found), (room, found_grads), (_, grads) = (places() for _ in range(4))
    raw[0][2], raw[1][3] = 0, 0  # epsilon is all there is
    y_before, turned_before, room_before = y.clone(), turned.clone(), room.clone()
    epsilons, weights = [1e-5, 1e-3], [(torch.rand(width) + 0.5).to(dtype) for _ in range(2)]
    angles = torch.randn(6, width // 2).repeat(1, 2)
    turns = angles.cos().to(dtype), angles.sin().to(dtype)
    plain, plain_grads = ([x.cpu() for x in states] for states in (raw, grads))
    there = [x.to(DEVICE) for x in (*weights, *turns)]

    wanted = [torch.empty_like(x) for x in plain]
    scales = ops.rope_normed(plain[:2], weights, epsilons, *turns, wanted[:2])
    rstd = triton_heads.rope_normed(raw[:2], there[:2], epsilons, *there[2:], found[:2])
    for index in range(2):
        near(found[index], wanted[index], dtype)
        near(rstd[index], scales[index], torch.float32)
    assert torch.equal(turned[:, heads + shared :], turned_before[:, heads + shared :])

    ops.rope_normed_backward(plain_grads, plain[:2], weights, scales, *turns, wanted)
    triton_heads.rope_normed_backward(grads, raw[:2], there[:2], rstd, *there[2:], found_grads)
    for index in range(3):
        near(found_grads[index], wanted[index], dtype)
    assert torch.equal(found_grads[2], grads[2])
    assert torch.equal(room[:, -1:], room_before[:, -1:])
    assert torch.equal(y, y_before)


@pytest.mark.parametrize("dtype", [*DTYPES[1:], torch.float16], ids=str, indirect=True)
def test_rope_after_head_norms_rounds_as_one_kernel_after_the_other(dtype: torch.dtype) -> None:
    tokens, width = 40, 64
    raw, grads = ([made(tokens, n, width, dtype=dtype) for n in (6, 2, 2)] for _ in range(2))
    weights = [(torch.rand(width) + 0.5).to(dtype).to(DEVICE) for _ in range(2)]
    angles = torch.randn(tokens, width // 2).repeat(1, 2).to(DEVICE)
    turns = angles.cos().to(dtype), angles.sin().to(dtype)
    wanted = [torch.empty_like(x) for x in raw]
    found = [torch.empty_like(x) for x in raw]

    scales = [
        triton_ops.rms_norm(x.flatten(0, 1), weight, 1e-5, out.flatten(0, 1))
        for x, weight, out in zip(raw, weights, wanted, strict=False)
    ]
    triton_ops.rope(wanted[:2], *turns, 1, wanted[:2])
    rstd = triton_heads.rope_normed(raw[:2], weights, [1e-5, 1e-5], *turns, found[:2])
    for index in range(2):  # a sum in another order may tip a number to the other side
        assert (found[index] == wanted[index]).double().mean() > 0.99

    triton_ops.rope(grads, *turns, -1, wanted)
    for grad, x, weight, scale in zip(wanted, raw, weights, scales, strict=False):
        flat = grad.flatten(0, 1), x.flatten(0, 1)
        triton_ops.rms_norm_backward(*flat, weight, scale, None)
    triton_heads.rope_normed_backward(grads, raw[:2], weights, rstd, *turns, found)
    for index in range(3):
        assert (found[index] == wanted[index]).double().mean() > 0.99


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


@pytest.mark.parametrize("copied", [None, "right", "below"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bit_weights_expand_to_bitsandbytes_own_values(
    kind: str, double: bool, copied: str | None
) -> None:
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Params4bit

    torch.manual_seed(0)
    dtype = torch.bfloat16 if CUDA else torch.float32
    weights = []
    for rows in (24, 9, 96):
        plain = torch.randn(rows, 1024, dtype=dtype)
        weight = Params4bit(plain, quant_type=kind, compress_statistics=double)
        weights.append(weight.to(DEVICE))
    wanted = torch.cat([dequantize_4bit(w.data, w.quant_state) for w in weights])
    room = torch.full((129 + 7, 1024 + 24), torch.nan, dtype=dtype, device=DEVICE)
    right, below = room[:129, 1032:1037], room[130:133, :1024]
    target = {"right": right, "below": below, None: None}[copied]
    copy = None
    if target is not None:
        copy = made(len(target), 2048, dtype=dtype)[:, : target.shape[1]], target
    triton_four_bit.Expansion(weights).into(room[:129, :1024], copy)
    torch.testing.assert_close(room[:129, :1024], wanted, rtol=4e-3 if CUDA else 1e-6, atol=1e-6)
    if copy is not None:
        assert torch.equal(*copy)
        copy[1].fill_(torch.nan)
    room[:129, :1024] = torch.nan
    assert room.isnan().all()


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_four_bit_codes_may_lie_in_any_dtype(storage: torch.dtype) -> None:
    """A checkpoint may hold them so (`bnb_4bit_quant_storage`), eight codes in 4 bytes as ever."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Params4bit

    torch.manual_seed(0)
    dtype = torch.bfloat16 if CUDA else torch.float32
    plain = torch.randn(40, 256, dtype=dtype)
    weight = Params4bit(plain, quant_type="nf4", quant_storage=storage).to(DEVICE)
    assert weight.dtype == storage
    out = torch.full((40, 256), torch.nan, dtype=dtype, device=DEVICE)
    triton_four_bit.Expansion([weight]).into(out, None)
    wanted = dequantize_4bit(weight.data, weight.quant_state)
    torch.testing.assert_close(out, wanted, rtol=4e-3 if CUDA else 1e-6, atol=1e-6)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("columns", [96, 2048, 40000])
def test_rows_are_quantised_as_by_the_twin(columns: int, scaled: bool, dtype: torch.dtype) -> None:
    """Codes that fp8 holds already, times powers of two: nothing may be rounded."""
    codes = (torch.randn(6, columns) * 60).to(fp8.DTYPE).float()
    codes[:, 3] = fp8.LARGEST
    codes[4] = 0
    factors = 2.0 ** torch.randint(-3, 4, (columns, 1)).float()
    rows = 2.0 ** torch.tensor([-60.0, -9, 0, 3, 0, 40])[:, None]
    x = codes * rows / (factors.T if scaled else 1)
    room = made(6, columns + 8, dtype=dtype)
    room[:, :columns] = x.to(dtype)
    found, scales = triton_fp8.quantize_rows(
        room[:, :columns], factors.to(DEVICE) if scaled else None
    )
    assert torch.equal(found.float().cpu(), codes)
    zero = torch.tensor([False] * 4 + [True, False])
    torch.testing.assert_close(scales.cpu()[~zero], rows[~zero], rtol=1e-6, atol=0)


@pytest.mark.skipif(not CUDA, reason="the interpreter rounds wrongly where the exponent changes")
def test_rounding_is_that_of_the_twin(dtype: torch.dtype) -> None:
    x = made(64, 5000, dtype=dtype)
    found, scales = triton_fp8.quantize_rows(x)
    wanted, wanted_scales = fp8.quantize_rows(x.cpu())
    torch.testing.assert_close(scales.cpu(), wanted_scales, rtol=1e-6, atol=0)
    differing = (found.float().cpu() != wanted.float()).float().mean()
    assert differing < 1e-3  # a division that ends a bit lower falls on the other side of a tie
    near(found.float() * scales, wanted.float() * wanted_scales, torch.bfloat16)


@pytest.mark.skipif(not CUDA, reason="how fp8 is cast is the GPU's own")
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_stay_so(wrong: float) -> None:
    x = torch.randn(3, 64, device=DEVICE)
    x[1, 5] = wrong
    codes, scales = triton_fp8.quantize_rows(x)
    assert (codes.float() * scales).isfinite().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("shape", [(16, 16), (200, 304), (128, 1024)])
def test_bytes_are_turned_over(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    source = torch.randint(0, 256, shape, dtype=torch.uint8).to(DEVICE)
    target = torch.zeros(shape[1], shape[0], dtype=torch.uint8, device=DEVICE)
    triton_products.turn(source.view(fp8.DTYPE), target.view(fp8.DTYPE))
    assert torch.equal(target, source.T)


def same_codes(
    found: tuple[torch.Tensor, torch.Tensor], wanted: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """All but a few: the interpreter halves what rounds up to a power of two; GPUs have ties."""
    torch.testing.assert_close(found[1].cpu(), wanted[1], rtol=1e-2, atol=0)
    assert (found[0].float().cpu() != wanted[0].float()).float().mean() < 0.05


@pytest.mark.parametrize("columns", [64, 96, 2048])
def test_rms_norm_with_codes(columns: int, dtype: torch.dtype) -> None:
    x = made(7, columns, dtype=dtype)
    weight = (torch.rand(columns) + 0.5).to(dtype).to(DEVICE)
    values, wanted = torch.empty_like(x), torch.empty_like(x)
    codes, scales, rstd = triton_fp8.rms_norm(x, weight, 1e-5, values)
    near(rstd, triton_ops.rms_norm(x, weight, 1e-5, wanted), torch.float32)
    near(values, wanted, dtype)
    same_codes((codes, scales), fp8.quantize_rows(wanted.cpu()))


@pytest.mark.parametrize("columns", [24, 2500, 20000])
def test_swiglu_with_codes_and_its_gradient(columns: int, dtype: torch.dtype) -> None:
    both, dh = made(5, 2 * columns, dtype=dtype), made(5, columns, dtype=dtype)
    factors = torch.rand(2 * columns, 1).to(DEVICE) + 0.1
    values, wanted = torch.empty_like(dh), torch.empty_like(dh)
    codes = triton_fp8.swiglu(both, values)
    triton_ops.swiglu(both, wanted)
    assert torch.equal(values, wanted)
    same_codes(codes, fp8.quantize_rows(wanted.cpu()))
    again, product = both.clone(), dh.clone()
    triton_ops.swiglu_backward(product, again)
    codes = triton_fp8.swiglu_backward(dh, both, factors)
    near(both, again, dtype)
    near(dh, product, dtype)
    same_codes(codes, fp8.quantize_rows(both.cpu(), factors.cpu().T))


@pytest.mark.parametrize(("rows", "columns", "ranks"), [(5, 48, 8), (70, 160, 24), (64, 128, 128)])
def test_factors_and_stream_are_added_at_once(
    rows: int, columns: int, ranks: int, dtype: torch.dtype
) -> None:
    y, add = made(rows, columns, dtype=dtype), made(rows, columns, dtype=dtype)
    low, factors = made(rows, ranks, dtype=dtype), made(columns, ranks + 8, dtype=dtype)[:, 8:]
    wanted = y.double() + low.double() @ factors.double().T + add.double()
    triton_products.add_both(y, low, factors, add)
    near(y, wanted, dtype)


@pytest.mark.parametrize(("rows", "columns", "ranks"), [(150, 200, 16), (64, 128, 8), (9, 264, 40)])
def test_gated_backward_in_one_pass(
    rows: int, columns: int, ranks: int, dtype: torch.dtype
) -> None:
    room = made(rows, 2 * columns + 40, dtype=dtype)
    both, dh = room[:, : 2 * columns], made(rows, columns, dtype=dtype)
    beside = room[:, 2 * columns :].clone()
    low = made(rows, ranks, dtype=dtype)
    factors = made(ranks, columns + 8, dtype=dtype)[:, :columns]
    gates = both.cpu().clone()
    wanted = ops.gated_backward(dh.cpu().clone(), gates, low.cpu(), factors.cpu())
    found = triton_gated.gated_backward(dh, both, low, factors)
    near(both, gates, dtype)
    near(found, wanted, dtype)
    assert torch.equal(room[:, 2 * columns :], beside)


def test_masters_are_spread_in_one_launch(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(triton_spread, "BLOCK", 64)
    sources = [made(*shape, dtype=torch.float32) for shape in ((16, 40), (100, 8), (33,))]
    room = made(120, 60, dtype=dtype)
    targets = [made(16, 50, dtype=dtype)[:, :40], room[10:110, 4:12], made(33, dtype=dtype)]
    around = room.clone()
    scales = [1.0, 2.0, 1.5]
    spread = triton_spread.Spread(sources, targets, scales)
    spread.copy()
    for source, target, scale in zip(sources, targets, scales, strict=True):
        assert torch.equal(target, (source * scale).to(dtype))
    around[10:110, 4:12] = room[10:110, 4:12]
    assert torch.equal(room, around)
    assert spread.of(sources)
    assert not spread.of([sources[0], sources[1].clone(), sources[2]])
