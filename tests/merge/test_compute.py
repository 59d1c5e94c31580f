"""Working on a few rows at a time gives the whole tensor's result, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional as bnb
from transformers import BitsAndBytesConfig

from peftcli import fp8
from peftcli.merge import deltas
from peftcli.merge.blocks import BLOCK
from peftcli.merge.checkpoint import Stored
from peftcli.merge.compute import CPU_ELEMENTS, Arithmetic, Rounding, held_whole, new_rows
from peftcli.merge.deltas import Update
from peftcli.merge.direct import Memory
from peftcli.merge.plan import Item
from peftcli.merge.quantized import EightBits, FourBits
from peftcli.merge.skeleton import Place

ROWS, COLUMNS, RANK = 1551, 512, 16
CPU = Arithmetic(torch.device("cpu"), fp32=True, quantization=None)


def random(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator) * 0.02


def write(tmp_path: Path, values: torch.Tensor) -> Stored:
    file = tmp_path / "values"
    file.write_bytes(values.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return Stored("w", tuple(values.shape), values.dtype, file)


def merged(
    tmp_path: Path, base: torch.Tensor, update: Update
) -> tuple[torch.Tensor, Rounding, int]:
    stored = write(tmp_path, base)
    item = Item("w", stored, Place("w"), (update,), stored.shape, stored.dtype)
    parts = list(new_rows(item, CPU, Memory()))
    rounding = sum((part for _, part in parts), Rounding())
    return torch.cat([rows for rows, _ in parts]), rounding, len(parts)


def test_lora(tmp_path: Path) -> None:
    base, a, b = random(ROWS, COLUMNS), random(RANK, COLUMNS), random(ROWS, RANK)
    assert ROWS * COLUMNS > 2 * CPU_ELEMENTS
    found, rounding, parts = merged(tmp_path, base, deltas.lora(a, b, 2.0, transposed=False))
    assert parts > 2
    assert torch.equal(found, base + (b @ a) * 2.0)
    assert rounding.unchanged == 0


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(
    ("columns", "transposed", "whole"),
    [
        (512, False, False),
        (520, False, False),
        (511, False, False),
        (463, False, True),
        (512, True, True),
    ],
)
def test_rounding_first(
    tmp_path: Path, columns: int, transposed: bool, whole: bool, double: bool
) -> None:
    """What bitsandbytes makes of the whole tensor, where few rows are worked on at a time too."""
    base = (random(ROWS, columns) * random(ROWS, 1).abs()).bfloat16()
    values = base.T.contiguous() if transposed else base
    codes, state = bnb.quantize_4bit(
        values.view(-1), blocksize=BLOCK, compress_statistics=double, quant_type="nf4"
    )
    rounded = bnb.dequantize_4bit(codes, state).view_as(values)
    stored = write(tmp_path, base)
    a, b = random(RANK, columns), random(ROWS, RANK)
    updates = (deltas.lora(a, b, 2.0, transposed=False),)
    item = Item("w", stored, Place("w"), updates, stored.shape, torch.float32, True, transposed)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double
    )
    arithmetic = Arithmetic(CPU.device, True, FourBits(config, torch.bfloat16))
    assert held_whole(item, arithmetic) == whole
    parts = [rows for rows, _ in new_rows(item, arithmetic, Memory())]
    assert len(parts) > 2
    expanded = rounded.T if transposed else rounded
    assert torch.equal(torch.cat(parts), expanded.float() + (b @ a) * 2.0)


def test_rounding_of_a_tensor_that_lies_the_other_way(tmp_path: Path) -> None:
    """As pickles may hold one."""
    base = random(COLUMNS, ROWS).bfloat16().T
    stored = replace(write(tmp_path, base), values=base)
    item = Item("w", stored, Place("w"), (), stored.shape, stored.dtype, dequantized=True)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantization = FourBits(config, torch.bfloat16)
    parts = [
        rows for rows, _ in new_rows(item, Arithmetic(CPU.device, True, quantization), Memory())
    ]
    assert torch.equal(torch.cat(parts), quantization.round_trip(base, transposed=False))


@pytest.mark.parametrize("columns", [511, 512])
def test_rounding_to_fp8_first(tmp_path: Path, columns: int) -> None:
    base = random(ROWS, columns).bfloat16()
    stored = write(tmp_path, base)
    item = Item("w", stored, Place("w"), (), stored.shape, torch.float32, dequantized=True)
    arithmetic = Arithmetic(CPU.device, True, EightBits(torch.bfloat16))
    parts = [rows for rows, _ in new_rows(item, arithmetic, Memory())]
    assert len(parts) > 2
    assert torch.equal(torch.cat(parts), fp8.round_trip(base))


def test_lora_on_transposed_weights(tmp_path: Path) -> None:
    base, a, b = random(ROWS, COLUMNS), random(RANK, ROWS), random(COLUMNS, RANK)
    found, _, parts = merged(tmp_path, base, deltas.lora(a, b, 2.0, transposed=True))
    assert parts > 2
    assert torch.equal(found, base + (b @ a).T * 2.0)


def test_dora(tmp_path: Path) -> None:
    base, a, b = random(ROWS, COLUMNS), random(RANK, COLUMNS), random(ROWS, RANK)
    magnitude = random(ROWS).abs() + 1
    update = deltas.dora(a, b, magnitude, 2.0, transposed=False)
    found, _, parts = merged(tmp_path, base, update)
    changed = base + (b @ a) * 2.0
    expected = (magnitude / torch.linalg.norm(changed, dim=1)).view(-1, 1) * changed
    assert parts > 2
    assert torch.equal(found, expected)


@pytest.mark.parametrize("inputs_first", [False, True])
def test_experts(tmp_path: Path, inputs_first: bool) -> None:
    experts, inputs, outputs = 5, 96, 160
    a, b = random(experts * RANK, inputs), random(outputs, RANK * experts)
    update = deltas.lora_experts(a, b, 0.5, experts=experts, inputs_first=inputs_first)
    factors = (b.reshape(outputs, RANK, experts), a.reshape(experts, RANK, inputs))
    order = "e i o" if inputs_first else "e o i"
    delta = torch.einsum(f"o r e, e r i -> {order}", *factors) * 0.5
    base = torch.zeros_like(delta)
    found, _, _ = merged(tmp_path, base, update)
    assert torch.equal(found, delta)
    region = (3, slice(32, 96))
    assert torch.equal(update.apply(base[region], region, base[region]), delta[region])


def test_token_rows_fall_into_the_right_part(tmp_path: Path) -> None:
    base, rows = random(ROWS, COLUMNS), random(3, COLUMNS)
    tokens = [1550, 0, 600]
    found, rounding, _ = merged(tmp_path, base, deltas.token_rows(rows, tokens))
    expected = base.clone()
    expected[tokens] = rows
    assert torch.equal(found, expected)
    assert rounding.touched == 3 * COLUMNS


def test_rounding_is_counted(tmp_path: Path) -> None:
    """At 0.3 % of the weights' size about half of the update is below bfloat16's resolution."""
    base = random(ROWS, COLUMNS).bfloat16()
    a, b = random(RANK, COLUMNS), random(ROWS, RANK)
    scale = 0.003 * base.float().norm().item() / (b @ a).norm().item()
    found, rounding, _ = merged(tmp_path, base, deltas.lora(a, b, scale, transposed=False))
    exact = base.float() + (b @ a) * scale
    touched = exact != base.float()
    assert rounding.touched == int(touched.sum())
    assert rounding.unchanged == int((touched & (found == base)).sum())
    assert rounding.finite
    assert 0.4 < rounding.unchanged / rounding.touched < 0.6
    error = (found.float() - exact).norm() / (exact - base.float()).norm()
    assert rounding.relative_error == pytest.approx(error.item(), rel=1e-3)


def test_parts_of_a_large_tensor_stand_for_it(tmp_path: Path) -> None:
    """So that in a model's sums it weighs as much as its size, beside tensors seen as a whole."""
    base = random(20 * CPU_ELEMENTS // COLUMNS + 7, COLUMNS).bfloat16()
    a, b = random(RANK, COLUMNS), random(base.shape[0], RANK)
    found, rounding, parts = merged(tmp_path, base, deltas.lora(a, b, 0.1, transposed=False))
    assert parts == 20
    change = (b @ a) * 0.1
    exact = base.float() + change
    assert rounding.touched == pytest.approx(int((exact != base.float()).sum()), rel=1e-3)
    assert rounding.unchanged == pytest.approx(int((found == base).sum()), rel=0.05)
    error = ((found.float() - exact).norm() / change.norm()).item()
    assert rounding.relative_error == pytest.approx(error, rel=0.05)


@pytest.mark.parametrize("fp32", [True, False])
def test_rounding_is_measured_against_the_exact_sum(tmp_path: Path, fp32: bool) -> None:
    """Sums in bfloat16 lose their part of the update before anything is saved."""
    base = random(ROWS, COLUMNS).bfloat16()
    a, b = random(RANK, COLUMNS), random(ROWS, RANK)
    update = deltas.lora(a, b, 0.1, transposed=False)
    stored = write(tmp_path, base)
    item = Item("w", stored, Place("w"), (update,), stored.shape, stored.dtype)
    parts = list(new_rows(item, Arithmetic(torch.device("cpu"), fp32, None), Memory()))
    rounding = sum((part for _, part in parts), Rounding())
    found = torch.cat([rows for rows, _ in parts])
    change = (b @ a) * 0.1
    exact = base.float() + change
    assert torch.equal(found, exact.bfloat16() if fp32 else base + change.bfloat16())
    touched = exact != base.float()
    assert rounding.touched == int(touched.sum())
    assert rounding.unchanged == int((touched & (found == base)).sum()) > 0
    error = ((found.float() - exact).norm() / change.norm()).item()
    assert rounding.relative_error == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_value_that_is_no_number_in_any_block(tmp_path: Path, value: float) -> None:
    base, a, b = random(ROWS, COLUMNS).half(), random(RANK, COLUMNS), random(ROWS, RANK)
    b[ROWS - 1] = value
    _, rounding, _ = merged(tmp_path, base, deltas.lora(a, b, 2.0, transposed=False))
    assert not rounding.finite


@pytest.mark.parametrize("shape", [(0, 1024, 1024), (0, 4), (3, 0), (0,)])
def test_an_empty_tensor(tmp_path: Path, shape: tuple[int, ...]) -> None:
    stored = write(tmp_path, torch.zeros(shape))
    item = Item("w", stored, Place("w"), (), stored.shape, torch.bfloat16)
    parts = [rows for rows, _ in new_rows(item, CPU, Memory())]
    assert torch.cat(parts).shape == shape
    assert not item.copied
