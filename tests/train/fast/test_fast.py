"""The fused functions against plain PEFT: the same loss and the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from tiny_models import linears_of, tiny_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from peftcli.methods.bottleneck_tuner import BottleneckConfig
from peftcli.recipe.checks import FUSED
from peftcli.train import attention
from peftcli.train.batches import Batches, model_inputs
from peftcli.train.fast import blocks, four_bit
from peftcli.train.fast.lora import Unsupported, weights_of
from peftcli.train.fast.model import accelerate
from peftcli.train.fast.weights import Weights

ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def rows(seed: int = 0, lengths: tuple[int, ...] = (5, 9, 12, 7)) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        ids = torch.randint(3, 128, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return made


def adapted(
    family: str, targets: list[str], config: dict[str, Any] | None = None, **options: Any
) -> Any:
    """A tiny float64 model whose adapter is no longer zero."""
    attention.register()
    torch.manual_seed(0)
    built = tiny_config(family, **(config or {}))
    base = AutoModelForCausalLM.from_config(built, attn_implementation=attention.NAME)
    names = linears_of(family, targets)
    settings = {"r": 4, "lora_alpha": 12, "target_modules": names, **options}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings)).double()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
        elif "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model.train()


def with_bottlenecks(family: str, **options: Any) -> Any:
    """A tiny float64 model with bottleneck adapters that are no longer the identity."""
    attention.register()
    torch.manual_seed(0)
    config = tiny_config(family)
    base = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)
    modules = ["o_proj", "down_proj"]
    model = get_peft_model(
        base,
        BottleneckConfig(
            task_type="CAUSAL_LM", target_modules=modules, bottleneck_size=8, scaling=0.7, **options
        ),
    ).double()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.train()


def plain(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    inputs = model_inputs(batch)
    labels = inputs.pop("labels")
    logits = model(**inputs, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


TARGETS = {
    "all linear": ADAPTED,
    "queries and values": ["q_proj", "v_proj"],
    "mlp": ["gate_proj", "down_proj"],
    "outputs": ["o_proj", "up_proj"],
}


def compare(model: Any, lengths: tuple[int, ...] = (5, 9, 12, 7)) -> None:
    collate = Batches(0, micro_batch_size=4, longest=max(lengths), apart=True)
    (batch,) = collate(rows(lengths=lengths))["micro_batches"]
    expected = plain(model, batch)
    expected.backward()
    wanted = gradients(model)
    fast = accelerate(model)
    loss = fast.loss(batch, torch.ones((), dtype=torch.float64))
    loss.backward()
    found = gradients(model)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():  # transformers' norms compute in float32 at best
        distance = (found[name] - gradient).norm() / gradient.norm()
        assert distance < 1e-5, name


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("family", sorted(FUSED))
@pytest.mark.parametrize("lengths", [(5, 9, 12, 7), (8, 8)], ids=["end to end", "side by side"])
def test_loss_and_gradients_are_those_of_plain_peft(
    family: str, targets: list[str], lengths: tuple[int, ...]
) -> None:
    compare(adapted(family, targets), lengths)


PHI: dict[str, dict[str, Any]] = {
    "some columns turned": {"partial_rotary_factor": 0.75},  # Phi-4-mini
    "a window": {"sliding_window": 4},  # Phi-3-mini-4k
}


@pytest.mark.parametrize("lengths", [(5, 9, 12, 7), (8, 8)], ids=["end to end", "side by side"])
@pytest.mark.parametrize("config", PHI.values(), ids=PHI)
def test_what_phi_3_has_beside_joined_linears(
    config: dict[str, Any], lengths: tuple[int, ...]
) -> None:
    model = adapted("phi3", ADAPTED, config)
    if "sliding_window" not in config:
        turned = model.get_base_model().model.rotary_emb.inv_freq.numel()
        assert 2 * turned == 12 < model.get_base_model().config.head_dim
    compare(model, lengths)


@pytest.mark.parametrize("options", [{}, {"use_bias": False, "non_linearity": "relu"}])
@pytest.mark.parametrize("family", sorted(FUSED))
def test_bottleneck_adapters_have_the_gradients_of_their_modules(
    family: str, options: dict[str, Any]
) -> None:
    model = with_bottlenecks(family, **options)
    (batch,) = Batches(0, 4, 12, apart=True)(rows())["micro_batches"]
    expected = plain(model, batch)
    expected.backward()
    wanted = gradients(model)
    loss = accelerate(model).loss(batch, torch.ones((), dtype=torch.float64))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() < 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("fewest", [1024, 8], ids=["whole", "in parts"])
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("family", sorted(FUSED))
def test_checkpointed_layers_give_the_same_gradients(
    family: str, targets: list[str], fewest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "FEWEST", fewest)  # of 33 tokens
    monkeypatch.setattr(blocks, "MOST", fewest + 2)
    one, found = torch.ones((), dtype=torch.float64), []
    for checkpointing in (False, True):
        model = adapted(family, targets)
        (batch,) = Batches(0, 4, 12, apart=True)(rows())["micro_batches"]
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, kept=kept: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
        ):
            loss = accelerate(model, checkpointing).loss(batch, one)
        loss.backward()
        found.append((gradients(model), sum(kept)))
    (wanted, whole), (again, less) = found
    assert less < whole
    assert again.keys() == wanted.keys()
    for name, gradient in again.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("lowest", [1, 2])
def test_some_layers_checkpointed_keep_less_than_none_and_more_than_all(lowest: int) -> None:
    found, sizes = [], []
    for some in (None, lowest, 0):  # all, some, none
        model = adapted("llama", ADAPTED)
        layers = model.get_base_model().config.num_hidden_layers
        (batch,) = Batches(0, 4, 12, apart=True)(rows())["micro_batches"]
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, kept=kept: kept.append(tensor.numel()) or tensor, lambda tensor: tensor
        ):
            fast = accelerate(model, True, lowest=some)
            fast.loss(batch, torch.ones((), dtype=torch.float64)).backward()
        found.append(gradients(model))
        sizes.append(sum(kept))
    assert sizes[0] <= sizes[1] < sizes[2]
    assert (sizes[0] == sizes[1]) == (lowest >= layers)
    for other in found[:2]:
        for name, gradient in found[2].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("fewest", [1024, 8], ids=["whole", "in parts"])
def test_checkpointed_bottlenecks_give_the_same_gradients(
    fewest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "FEWEST", fewest)
    monkeypatch.setattr(blocks, "MOST", fewest + 2)
    found = []
    for checkpointing in (False, True):
        model = with_bottlenecks("llama")
        (batch,) = Batches(0, 4, 12, apart=True)(rows())["micro_batches"]
        one = torch.ones((), dtype=torch.float64)
        accelerate(model, checkpointing).loss(batch, one).backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_a_layer_computed_again_leaves_out_its_last_product() -> None:
    """Nobody reads the layer's output a second time, and its down projection keeps none."""
    counts = []
    for checkpointing in (False, True):
        model = adapted("llama", ADAPTED)
        (batch,) = Batches(0, 4, 12, apart=True)(rows())["micro_batches"]
        fast = accelerate(model, checkpointing)
        with FlopCounterMode(display=False) as counter:
            fast.loss(batch, torch.ones((), dtype=torch.float64)).backward()
        counts.append(counter.get_total_flops())
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    borders = {"cu_seq_lens_q": batch["cu_seq_lens"], "max_length_q": batch["longest"]}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        fast.body(**inputs, **borders, use_cache=False)
    config = model.get_base_model().config
    columns = config.intermediate_size + 8  # the factors of the update, rounded up
    tokens = batch["input_ids"].numel()
    left_out = 2 * tokens * columns * config.hidden_size * config.num_hidden_layers
    assert counts[1] - counts[0] == counter.get_total_flops() - left_out


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("columns", [0, 8])
def test_four_bit_layers_are_the_same_one_after_the_other(columns: int, bias: bool) -> None:
    torch.manual_seed(0)
    layers = [Linear4bit(64, size, bias=False, quant_type="nf4") for size in (96, 32, 160)]
    for layer in layers:  # quantised on its way to where it is
        layer.to("cpu")
    x, dy = torch.randn(21, 64), torch.randn(21, 288)
    biases = torch.randn(288) if bias else None
    found = []
    for apart in (False, True):
        weights = weights_of(layers, columns, apart)
        torch.manual_seed(1)
        weights.shadow_a.normal_()
        weights.shadow_b.normal_()
        wide, out, gradient = weights.room(x, 64), weights.room(x, 288), weights.room(dy, 288)
        wide[:, :64], gradient[:, :288] = x, dy
        low = weights.low(wide)
        dlow = weights.backward_low(gradient)
        assert (dlow is None) == (columns == 0)
        y = weights.forward_in_place(wide, low, biases, out, add=dy)
        assert y.data_ptr() == out.data_ptr()
        alone = weights.forward_in_place(wide, low, biases, None)
        found.append([y.clone(), alone, weights.backward_in_place(gradient, dlow)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("columns", [0, 8])
@pytest.mark.parametrize("kind", ["whole", "apart", "held"])
def test_four_bit_products_read_only_what_they_ask_for(kind: str, columns: int) -> None:
    """The room of expanded weights holds what was there before, which need not be finite."""
    torch.manual_seed(0)
    layers = [Linear4bit(64, size, bias=False).to("cpu") for size in (96, 32)]
    weights = weights_of(layers, columns, kind == "apart")
    weights.shadow_a.normal_()
    weights.shadow_b.normal_()
    x, dy = torch.randn(5, 64), torch.randn(5, 128)
    low = x @ weights.shadow_a.T if columns else None
    wide, gradient = weights.room(x, 64), weights.room(dy, 128)
    wide[:, :64], gradient[:, :128] = x, dy
    dlow = weights.backward_low(gradient)

    def unknown() -> Weights:
        four_bit.forget_room()
        four_bit._scratch(200, 200, x).fill_(torch.nan)
        return weights.held() if kind == "held" else weights

    y, dx = unknown().forward(x, low, None), unknown().backward(dy, dlow)
    assert y.isfinite().all()
    assert dx.isfinite().all()
    in_place = unknown().forward_in_place(wide, low, None, None)
    torch.testing.assert_close(in_place, y, rtol=1e-5, atol=1e-4)
    in_place = unknown().backward_in_place(gradient, dlow)
    torch.testing.assert_close(in_place, dx, rtol=1e-5, atol=1e-4)


def test_a_step_of_the_optimizer_reaches_the_copies() -> None:
    model = adapted("llama", ADAPTED)
    (batch,) = Batches(0, 4, 12, apart=True)(rows())["micro_batches"]
    fast = accelerate(model)
    one = torch.ones((), dtype=torch.float64)
    before = fast.loss(batch, one).item()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(1.5)
    assert fast.loss(batch, one).item() == before
    fast.refresh()
    assert fast.loss(batch, one).item() != before


UNSUPPORTED = {
    "DoRA": {"use_dora": True},
    "dropout": {"lora_dropout": 0.1},
    "head": {"modules_to_save": ["lm_head"]},
    "biases": {"lora_bias": False, "bias": "all", "family": "qwen2"},
    "dropout on the stream": {"family": "phi3", "config": {"resid_pdrop": 0.1}},
}


@pytest.mark.parametrize("options", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_is_left_out_keeps_the_plain_forward_pass(options: dict[str, Any]) -> None:
    family = options.get("family", "llama")
    model = adapted(family, ADAPTED, **{k: v for k, v in options.items() if k != "family"})
    (batch,) = Batches(0, 4, 12, apart=True)(rows())["micro_batches"]
    before = plain(model.eval(), batch).item()
    with pytest.raises(Unsupported):
        accelerate(model)
    assert plain(model, batch).item() == before
