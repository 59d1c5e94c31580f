"""A base in fp8: what its numbers are; loss and gradients are those of the rounded base."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import linears_of, tiny_config
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from peftcli import fp8
from peftcli.errors import UsageError
from peftcli.recipe.checks import FUSED
from peftcli.train import attention
from peftcli.train.batches import Batches, model_inputs
from peftcli.train.fast.fp8 import Fp8, coded
from peftcli.train.fast.model import accelerate
from peftcli.train.kernels import fast_model

HALF_STEP = 2**-4  # of e4m3, which has three bits behind the leading one
TARGETS = list(fp8.LINEARS)


def rows() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(3, 128, (n,), generator=generator).tolist() for n in (5, 9, 12, 7)]
    return [{"input_ids": ids, "labels": [-100, -100, *ids[2:]]} for ids in drawn]


def adapted(family: str, *, rounded: bool, targets: list[str] = TARGETS) -> Any:
    """A tiny float64 model with an adapter that is not zero, perhaps on a base that was rounded."""
    attention.register()
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(tiny_config(family), attn_implementation=attention.NAME)
    model = get_peft_model(
        base,
        LoraConfig(
            r=4, lora_alpha=12, task_type="CAUSAL_LM", target_modules=linears_of(family, targets)
        ),
    ).double()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
        elif "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    if rounded:
        fp8.round_base(model)
    return model.train()


def batch() -> dict[str, Any]:
    (found,) = Batches(0, 4, 12, apart=True)(rows())["micro_batches"]
    return found


def plain_loss(model: Any) -> Tensor:
    inputs = model_inputs(batch())
    labels = inputs.pop("labels")
    logits = model(**inputs, use_cache=False).logits
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


def fast_loss(model: Any, checkpointing: bool = False) -> Tensor:
    one = torch.ones((), dtype=torch.float64)
    return accelerate(model, checkpointing, fp8=True).loss(batch(), one)


def gradients(model: Any) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def linears(*outputs: int, inputs: int = 32, dtype: torch.dtype = torch.float32) -> Any:
    made = [nn.Linear(inputs, size, bias=False).to(dtype) for size in outputs]
    for layer in made:
        layer.weight.requires_grad_(False)
    return made


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_rounding_moves_a_value_by_half_a_step_at_most(size: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(50, 64) * torch.rand(50, 1) * size
    weight[7] = 0
    rounded = fp8.round_trip(weight)
    largest = weight.abs().amax(1, keepdim=True)
    step = largest / fp8.LARGEST * 2**-9  # of the smallest numbers
    assert bool(((rounded - weight).abs() <= HALF_STEP * weight.abs() * 1.001 + step).all())
    assert not torch.equal(rounded, weight)
    torch.testing.assert_close(rounded.abs().amax(1, keepdim=True), largest, rtol=1e-6, atol=0)
    assert not rounded[7].any()
    torch.testing.assert_close(fp8.round_trip(rounded), rounded, rtol=1e-6, atol=0)


def test_weights_are_rounded_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(50, 64)
    whole = fp8.round_trip(weight)
    monkeypatch.setattr(fp8, "PART", 7 * 64)
    assert torch.equal(fp8.round_trip(weight), whole)
    layers = linears(50, inputs=64)
    layers[0].weight.copy_(weight)
    held = Fp8(layers, 0)
    assert torch.equal(held.codes.float() * held.scales, whole)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_numbers_that_are_not_finite_stay_so(wrong: float) -> None:
    x = torch.randn(3, 32)
    x[1, 5] = wrong
    y = Fp8(linears(16), 0).forward(x, None, None)
    assert y.isfinite().all(1).tolist() == [True, False, True]


def exact(count: int, columns: int) -> Tensor:
    """Rows that fp8 holds without rounding: codes of its own, the largest among them."""
    codes = (torch.randn(count, columns) * 60).to(fp8.DTYPE).float()
    codes[:, 0] = fp8.LARGEST
    return codes / 1024


def test_products_are_those_of_the_rounded_weights_where_inputs_need_no_rounding() -> None:
    """Sums of three terms, each checked beside float64."""
    torch.manual_seed(0)
    layers = linears(16, 48)
    rounded = torch.cat([fp8.round_trip(layer.weight) for layer in layers]).double()
    weights = Fp8(layers, 8)
    weights.shadow_a.normal_()
    weights.shadow_b.normal_()
    x, low, bias = exact(5, 32), torch.randn(5, 8), torch.randn(64)
    wanted = x.double() @ rounded.T + low.double() @ weights.shadow_b.double().T + bias.double()
    room = weights.room(x, 64)
    torch.testing.assert_close(weights.forward(x, low, bias).double(), wanted, rtol=0, atol=1e-4)
    assert weights.forward_in_place(coded(x), low, bias, room) is room
    torch.testing.assert_close(room.double(), wanted, rtol=0, atol=1e-4)
    add = torch.randn(5, 64)
    more = weights.forward(x, low, bias, add).double()
    torch.testing.assert_close(more, wanted + add, rtol=0, atol=1e-4)
    dy = exact(5, 64) / weights.scales.T  # what is rounded is dy times the scales
    wanted = dy.double() @ rounded + low.double() @ weights.shadow_a.double()
    torch.testing.assert_close(weights.backward(dy, low).double(), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", sorted(FUSED))
@pytest.mark.parametrize("targets", [TARGETS, ["q_proj", "down_proj"]], ids=["all", "two"])
def test_loss_and_gradients_are_those_of_peft_on_the_rounded_base(
    family: str, targets: list[str]
) -> None:
    """Apart from the rounding of activations, which moves gradients by about a tenth here."""
    reference = adapted(family, rounded=True, targets=targets)
    wanted_loss = plain_loss(reference)
    wanted_loss.backward()
    model = adapted(family, rounded=False, targets=targets)
    loss = fast_loss(model)
    loss.backward()
    wanted, found = gradients(reference), gradients(model)
    assert loss.item() == pytest.approx(wanted_loss.item(), rel=2e-3)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() < 0.2 * gradient.norm(), name
    whole, other = (torch.cat([g.flatten() for g in x.values()]) for x in (wanted, found))
    assert (whole - other).norm() < 0.12 * whole.norm()


def test_checkpointed_layers_give_the_same_gradients() -> None:
    found = []
    for checkpointing in (False, True):
        model = adapted("llama", rounded=False)
        fast_loss(model, checkpointing).backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_one_copy_of_the_weights_stays_in_one_byte_each() -> None:
    model = adapted("llama", rounded=False)
    before = {name: tuple(p.shape) for name, p in model.named_parameters()}
    accelerate(model, fp8=True)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == before
    frozen = dict(fp8.frozen_linears(model))
    assert len(frozen) == 7 * model.config.num_hidden_layers
    assert {layer.weight.dtype for layer in frozen.values()} == {fp8.DTYPE}
    storages = {layer.weight.untyped_storage().data_ptr() for layer in frozen.values()}
    assert len(storages) == 4 * model.config.num_hidden_layers  # a group shares one
    held = {s.weight.untyped_storage().data_ptr(): s.weight for s in frozen.values()}
    total = sum(weight.untyped_storage().nbytes() for weight in held.values())
    assert total == sum(layer.weight.numel() for layer in frozen.values())


def test_what_the_fused_layers_leave_out_is_refused_and_not_run_plainly() -> None:
    model = adapted("llama", rounded=False)
    model.base_model.model.lm_head.weight.requires_grad_(True)
    with pytest.raises(UsageError, match="fp8 runs on fused layers, which leave out a trained"):
        fast_model(model, checkpointing=False, fp8=True)
    assert {layer.weight.dtype for _, layer in fp8.frozen_linears(model)} == {torch.float64}


def near(found: Tensor, wanted: Tensor, limit: float) -> None:
    wanted = wanted.double().cpu()
    assert (found.double().cpu() - wanted).norm() < limit * wanted.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(5, 32, (16, 48)), (300, 4096, (6144,))])
def test_matrix_units_give_what_the_plain_twin_gives(
    tokens: int, inputs: int, outputs: tuple[int, ...], bias: bool
) -> None:
    torch.manual_seed(0)
    layers = linears(*outputs, inputs=inputs, dtype=torch.bfloat16)
    twins = linears(*outputs, inputs=inputs, dtype=torch.bfloat16)
    for layer, twin in zip(layers, twins, strict=True):
        twin.load_state_dict(layer.state_dict())
    plain, quick = Fp8(twins, 16), Fp8([layer.cuda() for layer in layers], 16)
    assert torch.equal(quick.codes.float().cpu(), plain.codes.float())
    assert torch.equal(quick.scales.cpu(), plain.scales)
    for own in ("shadow_a", "shadow_b"):
        getattr(plain, own).normal_(std=0.02)
        getattr(quick, own).copy_(getattr(plain, own))
    x, dy = (torch.randn(tokens, n).bfloat16() for n in (inputs, plain.outputs))
    low = torch.randn(tokens, 16).bfloat16()
    added = torch.randn(plain.outputs).bfloat16() if bias else None
    room = quick.room(x.cuda(), plain.outputs)
    more = None if added is None else added.cuda()
    quick.forward_in_place(coded(x.cuda()), low.cuda(), more, room)
    near(room, plain.forward(x, low, added), 1e-2)
    stream = torch.randn(tokens, plain.outputs).bfloat16()
    again = quick.forward(x.cuda(), low.cuda(), more, stream.cuda())
    near(again, plain.forward(x, low, added, stream), 1e-2)
    near(quick.backward(dy.cuda(), low.cuda()), plain.backward(dy, low), 1e-2)


@pytest.mark.gpu
def test_tiny_gradients_survive() -> None:
    weights = Fp8([layer.cuda() for layer in linears(64, dtype=torch.bfloat16)], 0)
    dy = torch.randn(8, 64, device="cuda", dtype=torch.bfloat16)
    large = weights.backward(dy, None)
    near(weights.backward(dy * 2**-40, None).float() * 2**40, large, 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("family", sorted(FUSED))
def test_a_model_on_the_gpu_has_the_loss_and_gradients_of_its_twin(family: str) -> None:
    """In bfloat16, where the twin on the CPU computes in float64."""
    twin = adapted(family, rounded=False)
    wanted_loss = fast_loss(twin)
    wanted_loss.backward()
    model = adapted(family, rounded=False).bfloat16().cuda()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    inputs = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in batch().items()}
    fast = accelerate(model, fp8=True)
    loss = fast.loss(inputs, torch.ones((), device="cuda"))
    loss.backward()
    assert loss.item() == pytest.approx(wanted_loss.item(), rel=1e-2)
    wanted, found = gradients(twin), gradients(model)
    whole, other = (
        torch.cat([x[name].flatten().double().cpu() for name in wanted]) for x in (wanted, found)
    )
    assert torch.cosine_similarity(whole, other, dim=0) > 0.97


@pytest.mark.gpu
def test_the_gpu_never_holds_more_than_the_16_bit_weights_and_a_layer() -> None:
    config = tiny_config("llama")
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 1024, 4096, 8
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 8, 8, 128
    attention.register()
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=attention.NAME, dtype=torch.bfloat16
        ).requires_grad_(False)
    frozen = sum(layer.weight.numel() for _, layer in fp8.frozen_linears(model))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    accelerate(model, fp8=True)
    a_layer = 2 * frozen // config.num_hidden_layers
    in_float32 = 4 * 4 * 4096 * 1024  # four of them while the largest weight is rounded
    assert torch.cuda.max_memory_allocated() < before + a_layer + in_float32
    left = torch.cuda.memory_allocated()
    assert left < before - 0.98 * frozen + 2**23  # biases, scales and what a library keeps
