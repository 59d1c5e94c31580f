"""Inputs of layers in host memory: what that saves, what it costs, and when it is chosen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from estimate_plans import low_rank

from peftcli.estimate.duration import (
    HOST_BYTES_PER_SECOND,
    Lengths,
    duration,
    micro_batch_seconds,
)
from peftcli.estimate.fit import candidates, choose, modes, need, verdict
from peftcli.estimate.gpus import GIB, Gpu, find_gpu
from peftcli.estimate.memory import host_bytes, training_peak
from peftcli.estimate.plan import Plan
from peftcli.estimate.result import Estimate
from peftcli.estimate.run import run
from peftcli.estimate.step_model import FUSED_LORA
from peftcli.recipe.schema import Recipe

NAME = "llama-3.1-8b"
LAYERS, STREAM = 32, 2 * 4096  # bytes of a layer's input, per token


def fused(**changes: Any) -> Plan:
    return low_rank(NAME, **{"step": FUSED_LORA, "quantization": "nf4", **changes})


def estimate(gpu: str, length: int, method: Any = "qlora", **training: Any) -> Estimate:
    values = {
        "model": NAME,
        "method": method,
        "data": {"train": "rows.jsonl", "max_length": length},
        "training": training,
        "output": "out",
    }
    return run(Recipe.model_validate(values), find_gpu(gpu))


@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize("length", [64, 2048, 65_536])
def test_two_inputs_stay_on_the_gpu(length: int, micro_batch: int) -> None:
    plan = fused(length=length, micro_batch=micro_batch)
    full, offload = plan.checkpointed("full"), plan.checkpointed("offload")
    saved = (LAYERS - 2) * STREAM * plan.tokens
    assert host_bytes(offload) == saved
    assert host_bytes(full) == 0
    assert training_peak(offload).size <= training_peak(full).size
    if length == 65_536:
        one, most = gradients(full), gradients(offload)
        assert most == 30 * one  # those of all layers but the two
        assert training_peak(full).size - training_peak(offload).size == saved + one - most


def gradients(plan: Plan) -> float:
    return sum(part.size for part in training_peak(plan).parts if part.name == "gradients")


@pytest.mark.parametrize("rank", [8, 512])
@pytest.mark.parametrize("name", ["llama-3.2-1b", NAME, "qwen2.5-32b"])
def test_it_never_needs_more_than_full_nor_full_more_than_none(name: str, rank: int) -> None:
    gpu = find_gpu("4090")
    for length in (64, 1024, 16_384):
        plan = low_rank(name, step=FUSED_LORA, length=length, rank=rank)
        none, full, offload = (plan.checkpointed(mode) for mode in modes(plan))
        assert need(offload, gpu).high <= need(full, gpu).high <= need(none, gpu).high
        lengths = Lengths(length, length)
        seconds = [micro_batch_seconds(x, gpu, lengths) for x in (none, full, offload)]
        assert seconds == sorted(seconds)


def test_plans_of_plain_steps_never_get_it() -> None:
    plan = low_rank(NAME)
    assert not any(x.offload for x in candidates(plan))
    assert plan.checkpointed("offload") == plan.checkpointed("full")
    assert any(x.offload for x in candidates(fused()))


@pytest.mark.parametrize("gib", range(6, 48, 3))
def test_it_is_chosen_only_where_nothing_else_fits(gib: int) -> None:
    gpu = replace(find_gpu("4090"), memory_mib=1024 * gib)
    plans = candidates(fused(length=16_384, batch=4))
    others = [x for x in plans if not x.offload and verdict(x, gpu) == "fits"]
    chosen = choose(plans, gpu)
    if others:  # of those that are checkpointed in full as few layers as need it
        assert chosen is not None
        assert chosen in others or chosen.checkpointed("full") in others
    elif chosen is not None:
        assert chosen.offload


def test_layers_below_the_lowest_adapter_keep_nothing() -> None:
    last = tuple(replace(x, layers=x.layers[-4:]) for x in fused().targets)
    plan = replace(fused(length=4096), targets=last).checkpointed("offload")
    assert host_bytes(plan) == 2 * STREAM * 4096
    one = tuple(replace(x, layers=x.layers[-1:]) for x in last)
    assert host_bytes(replace(plan, targets=one)) == 0


def test_copies_that_are_slower_than_the_layers_are_waited_for() -> None:
    lengths, plan = Lengths(8192, 8192), fused(length=8192)
    card = find_gpu("h100")
    slow = micro_batch_seconds(plan.checkpointed("full"), card, lengths)
    assert micro_batch_seconds(plan.checkpointed("offload"), card, lengths) == slow
    fast = replace(card, tflops=1e6, bandwidth_gb_s=1e6)
    one = low_rank("llama-3.2-1b", length=8192)
    unhindered = {"floor_seconds": 0.0, "floor_again": 0.0, "floor_adapted": 0.0}
    one = replace(one, step=replace(FUSED_LORA, **unhindered))
    full, offload = (
        micro_batch_seconds(one.checkpointed(mode), fast, lengths) for mode in ("full", "offload")
    )
    copying = host_bytes(one.checkpointed("offload")) / HOST_BYTES_PER_SECOND
    assert offload == pytest.approx(2 * copying)
    assert offload > 10 * full


def test_the_range_holds_copies_at_half_and_twice_their_rate() -> None:
    plan = low_rank("llama-3.2-1b", step=FUSED_LORA, length=8192).checkpointed("offload")
    fast = replace(find_gpu("h100"), tflops=1e6, bandwidth_gb_s=1e6)
    unhindered = {"floor_seconds": 0.0, "floor_again": 0.0, "floor_adapted": 0.0}
    plan = replace(plan, step=replace(plan.step, **unhindered))
    steps = 10**6  # the start counts for nothing
    found = duration(plan, fast, steps, Lengths(8192, 8192))
    assert found is not None
    copying = host_bytes(plan) / HOST_BYTES_PER_SECOND
    least, likely, most = (seconds / steps for seconds in found.seconds)
    assert likely == pytest.approx(2 * copying, rel=0.01)
    assert least == pytest.approx(copying, rel=0.1)
    assert most == pytest.approx(4 * copying, rel=0.01)


def test_a_card_of_24_gib_holds_a_long_row_of_an_8b() -> None:
    found = estimate("4090", 131_072)
    assert found.verdict == "fits"
    assert found.settings.checkpointing == "offload"
    assert found.memory.host_gib == 30.0
    assert found.notes[0] == "30.0 GiB of host memory for the layers' inputs"
    assert found.limits is not None
    assert found.limits.tokens_per_row > 122_880
    assert found.limits.checkpointing == "offload"
    assert found.limits.host_gib == 30 * STREAM * found.limits.tokens_per_row / GIB
    assert isinstance(estimate("4090", 16_384).settings.checkpointing, int)


def test_what_the_recipe_says_is_done() -> None:
    found = estimate("h200", 2048, checkpointing="offload")
    assert found.settings.checkpointing == "offload"
    full = estimate("h200", 2048, checkpointing="full")
    assert full.limits is not None
    assert (full.limits.checkpointing, full.limits.host_gib) == ("full", 0.0)
    assert full.memory.host_gib == 0
    plain = estimate("4090", 131_072, {"name": "lora", "dropout": 0.1})
    assert plain.settings.checkpointing == "full"


def test_it_is_advised_with_what_it_costs() -> None:
    found = estimate("4090", 131_072, checkpointing="full")
    change = found.changes[0]
    assert change.line == "training.checkpointing: offload"
    assert change.fits
    assert change.saves_gib == pytest.approx(30.0, abs=0.2)
    text = "the same result, and 30.0 GiB of host memory for the layers' inputs"
    assert change.consequence == text
    assert found.paste == "training:\n  checkpointing: offload"
    assert "30 to 45 % slower" in _advice(estimate("4090", 131_072, checkpointing="none"))
    some = estimate("4090", 131_072, checkpointing=7)
    assert "the same result, 25 more layers computed again, and 30.0" in _advice(some)
    plain = estimate("4090", 131_072, {"name": "lora", "dropout": 0.1}, checkpointing="full")
    assert "offload" not in _advice(plain)


def _advice(found: Estimate) -> str:
    lines = [f"{x.line}: {x.consequence}" for x in found.changes if "offload" in x.line]
    return "; ".join(lines)


def test_a_card_without_rates_can_choose_it() -> None:
    card = Gpu("GPU with 24 GiB", 24 * 1024, 0.0, 0.0, 89)
    chosen = choose(candidates(fused(length=131_072, batch=1)), card)
    assert chosen is not None
    assert chosen.offload
