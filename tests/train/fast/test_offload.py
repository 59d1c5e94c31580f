"""Layers whose inputs wait in host memory: the gradients of layers that keep everything."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from allocations import Allocations
from peft import LoraConfig, get_peft_model
from tiny_models import linears_of, tiny_config
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from peftcli.methods.bottleneck_tuner import BottleneckConfig
from peftcli.recipe.checks import FUSED
from peftcli.train import attention
from peftcli.train.batches import Batches
from peftcli.train.fast import host
from peftcli.train.fast.host import Host
from peftcli.train.fast.model import FastModel, accelerate

LAYERS = 5
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "all linear": {"target_modules": ALL},
    "queries and values": {"target_modules": ["q_proj", "v_proj"]},
    "outputs": {"target_modules": ["o_proj", "up_proj"]},
    "from a middle layer on": {"target_modules": ALL, "layers_to_transform": [2, 4]},
    "the first layer": {"target_modules": ["down_proj"], "layers_to_transform": [0]},
    "the last layer": {"target_modules": ALL, "layers_to_transform": [LAYERS - 1]},
}
MODES: dict[str, dict[str, bool]] = {
    "none": {},
    "full": {"checkpointing": True},
    "offload": {"checkpointing": True, "offload": True},
}


def rows(lengths: tuple[int, ...], seed: int = 0) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(3, 128, (n,), generator=generator).tolist() for n in lengths]
    return [{"input_ids": ids, "labels": [-100, -100, *ids[2:]]} for ids in drawn]


def tuned(family: str, adapter: Any, layers: int = LAYERS) -> Any:
    """A float64 model with an adapter that is not zero."""
    attention.register()
    torch.manual_seed(0)
    config = tiny_config(family, num_hidden_layers=layers)
    base = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)
    model = get_peft_model(base, adapter).double()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
        elif "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.train()


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM", **options})


def bottlenecks(**options: Any) -> BottleneckConfig:
    return BottleneckConfig(
        task_type="CAUSAL_LM",
        target_modules=["o_proj", "down_proj"],
        bottleneck_size=8,
        scaling=0.7,
        **options,
    )


def micro_batches(lengths: tuple[int, ...] = (5, 9, 12, 7), rows_at_a_time: int = 2) -> Any:
    """Two of them, the second one longer than the first."""
    collate = Batches(0, rows_at_a_time, max(lengths), apart=True)
    parts = collate(rows(lengths))["micro_batches"]
    return sorted(parts, key=lambda part: part["input_ids"].numel())


def step(fast: FastModel, model: Any, parts: Any) -> dict[str, Tensor]:
    """The gradients of all the parts."""
    for part in parts:
        fast.loss(part, torch.ones((), dtype=torch.float64)).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_in_all_modes(family: str, adapter: Any, parts: Any) -> None:
    found = {}
    for mode, options in MODES.items():
        model = tuned(family, adapter)
        found[mode] = step(accelerate(model, **options), model, parts)
    assert found["none"]
    for mode in ("full", "offload"):
        assert found[mode].keys() == found["none"].keys()
    for name, gradient in found["none"].items():
        assert torch.equal(found["offload"][name], found["full"][name]), name
        torch.testing.assert_close(
            found["offload"][name], gradient, rtol=1e-9, atol=1e-12, msg=name
        )


@pytest.fixture(params=[2**24, 1000], ids=["a block", "many blocks"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "BLOCK", request.param)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("family", sorted(FUSED))
def test_lora_has_the_same_gradients(family: str, adapter: dict[str, Any]) -> None:
    adapter = {**adapter, "target_modules": linears_of(family, adapter["target_modules"])}
    assert_same_in_all_modes(family, lora(**adapter), micro_batches())


@pytest.mark.parametrize("options", [{}, {"layers_to_transform": [1, 3]}], ids=["all", "some"])
@pytest.mark.parametrize("family", sorted(FUSED))
def test_bottlenecks_have_the_same_gradients(family: str, options: dict[str, Any]) -> None:
    assert_same_in_all_modes(family, bottlenecks(**options), micro_batches())


def test_rows_side_by_side_have_the_same_gradients() -> None:
    assert_same_in_all_modes("llama", lora(target_modules=ALL), micro_batches((8, 8, 8, 8)))


def test_an_evaluation_keeps_nothing() -> None:
    model = tuned("llama", lora(target_modules=ALL))
    (part,) = micro_batches((5, 9))
    fast, one = accelerate(model, **MODES["offload"]), torch.ones((), dtype=torch.float64)
    with torch.no_grad():
        loss = fast.loss(part, one)
    assert not loss.requires_grad
    assert torch.equal(loss, fast.loss(part, one).detach())


@pytest.mark.parametrize(
    "adapter", [lora(target_modules=ALL, r=8), bottlenecks()], ids=["lora", "bottlenecks"]
)
def test_the_peak_hardly_grows_with_the_layers(adapter: Any) -> None:
    """By gradients of parameters; with `full` by the input of each layer as well."""
    added = {mode: peak(mode, adapter, 12) - peak(mode, adapter, 4) for mode in MODES}
    trained = [x for x in tuned("llama", adapter, 8).parameters() if x.requires_grad]
    assert added["offload"] <= sum(x.nbytes for x in trained)
    assert added["full"] >= added["offload"] + 0.95 * 8 * INPUT
    assert added["none"] > added["full"]


INPUT = 8 * tiny_config("llama").hidden_size * 600
"""Bytes of a layer's input in the test above."""


def peak(mode: str, adapter: Any, layers: int) -> int:
    """Bytes of a step beside all that there was before: the model, and blocks of host memory."""
    model = tuned("llama", adapter, layers)
    fast, parts = accelerate(model, **MODES[mode]), micro_batches((300, 300, 300, 300))
    step(fast, model, parts)
    gc.collect()
    allocations = Allocations(x for x in gc.get_objects() if isinstance(x, Tensor))
    before = allocations.live
    with allocations:
        step(fast, model, parts)
    return allocations.peak - before


def test_a_longer_batch_finds_room_and_a_shorter_one_uses_what_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host, "BLOCK", 1000)
    place, found = Host(), []
    for tokens in (10, 50, 20, 50):
        x = torch.randn(tokens, 64, dtype=torch.bfloat16)
        stored, _ = place.store(x)
        found.append(len(stored.blocks))
        back, _ = place.fetch(stored)
        assert torch.equal(back, x)
        assert back.data_ptr() != x.data_ptr()
    assert found == [2, 7, 3, 7]
    assert len(place._free) == 7


def test_a_step_that_failed_leaves_nothing_behind() -> None:
    """The layers below never went backward; the next step is as if that one had not been."""
    model = tuned("llama", lora(target_modules=ALL))
    fast, parts = accelerate(model, **MODES["offload"]), micro_batches()
    wanted = step(fast, model, parts)
    loss = fast.loss(parts[1], torch.ones((), dtype=torch.float64))
    layer = model.get_base_model().model.layers[1]
    handle = layer.mlp.down_proj.lora_A["default"].weight.register_hook(_fail)
    with pytest.raises(ZeroDivisionError):
        loss.backward()
    handle.remove()
    model.zero_grad()
    again = step(fast, model, parts)
    assert all(torch.equal(again[name], gradient) for name, gradient in wanted.items())


def _fail(_: Tensor) -> None:
    raise ZeroDivisionError


def test_going_backward_twice_is_refused() -> None:
    model = tuned("llama", lora(target_modules=ALL))
    (part,) = micro_batches((5, 9))
    loss = accelerate(model, **MODES["offload"]).loss(part, torch.ones((), dtype=torch.float64))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once only"):
        loss.backward()


def test_no_more_is_computed_than_with_full() -> None:
    """Neither the last product of a layer a second time, nor the gradient of the embeddings."""
    counts = []
    for mode in ("full", "offload"):
        model = tuned("llama", lora(target_modules=ALL))
        (part,) = micro_batches((5, 9))
        fast = accelerate(model, **MODES[mode])
        with FlopCounterMode(display=False) as counter:
            fast.loss(part, torch.ones((), dtype=torch.float64)).backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


GPU_WIDTH = 1024
GPU_ROWS = (50, 61, 64) * 64
"""Short rows, in which the attention's gradients do not depend on the order of its blocks."""


def on_gpu(mode: str, layers: int) -> tuple[Any, FastModel]:
    """A bfloat16 model on the GPU with a float32 adapter; large enough for copies to take time."""
    attention.register()
    torch.manual_seed(0)
    sizes = {"hidden_size": GPU_WIDTH, "intermediate_size": 2 * GPU_WIDTH, "head_dim": 64}
    config = tiny_config("llama", num_hidden_layers=layers, **sizes)
    base = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)
    model = get_peft_model(base.to("cuda", torch.bfloat16), lora(target_modules=ALL, r=8))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            nn.init.normal_(parameter, std=0.02)
    return model.train(), accelerate(model, **MODES[mode])


def gpu_batches(lengths: tuple[int, ...] = GPU_ROWS) -> list[dict[str, Any]]:
    """Two micro-batches of about 11,000 tokens each; two blocks of host memory a layer."""
    parts = [rows(lengths, seed=1), rows(lengths[:-9], seed=2)]
    found = []
    for part in parts:
        (batch,) = Batches(0, len(part), max(lengths) + 1, apart=True)(part)["micro_batches"]
        found.append({k: v.to("cuda") if isinstance(v, Tensor) else v for k, v in batch.items()})
    return found


def gpu_step(fast: FastModel, optimizer: torch.optim.Optimizer, parts: Any, scale: Tensor) -> None:
    fast.refresh()
    for part in parts:
        fast.loss(part, scale).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.gpu
def test_three_steps_on_a_gpu_are_those_of_full_bit_for_bit() -> None:
    found = []
    parts, scale = gpu_batches(), torch.full((), 1e-4, device="cuda")
    for mode in ("full", "full", "offload", "offload"):
        model, fast = on_gpu(mode, layers=12)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
        for _ in range(3):
            gpu_step(fast, optimizer, parts, scale)
        with torch.no_grad():
            loss = fast.loss(parts[0], scale)
        found.append([loss, *(p.detach() for p in trained)])
    full, twice, *others = found
    for one, other in zip(full, twice, strict=True):
        assert torch.equal(one, other), "two runs with full differ already"
    for offload in others:
        assert all(torch.equal(one, other) for one, other in zip(full, offload, strict=True))


@pytest.mark.gpu
def test_the_peak_on_a_gpu_hardly_grows_with_the_layers() -> None:
    parts, scale = gpu_batches(), torch.full((), 1e-4, device="cuda")
    added = {}
    for mode in ("full", "offload"):
        peaks = []
        for layers in (4, 20):
            model, fast = on_gpu(mode, layers)
            gc.collect()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            for part in parts:
                fast.loss(part, scale).backward()
            peaks.append(torch.cuda.max_memory_allocated() - before)
            del model, fast
        added[mode] = peaks[1] - peaks[0]
    inputs = 16 * 2 * GPU_WIDTH * parts[0]["input_ids"].numel()
    assert added["full"] > 0.9 * inputs
    assert added["full"] - added["offload"] > 0.9 * inputs


@pytest.mark.gpu
def test_a_steady_step_on_a_gpu_waits_for_nothing() -> None:
    parts, scale = gpu_batches(), torch.full((), 1e-4, device="cuda")
    model, fast = on_gpu("offload", layers=6)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    for _ in range(2):
        gpu_step(fast, optimizer, parts, scale)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gpu_step(fast, optimizer, parts, scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_pinned_memory_is_used_again() -> None:
    parts, scale = gpu_batches(), torch.full((), 1e-4, device="cuda")
    _, fast = on_gpu("offload", layers=6)
    made = []
    for _ in range(3):
        for part in parts:
            fast.loss(part, scale).backward()
        made.append(torch.cuda.host_memory_stats()["num_host_alloc"])
    assert made[0] == made[1] == made[2]
