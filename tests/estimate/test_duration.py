"""Step times against steps measured on an H200, and FLOPs counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from estimate_plans import described, full, low_rank, quantized

from peftcli.estimate.duration import (
    Lengths,
    duration,
    micro_batch_seconds,
    step_seconds,
)
from peftcli.estimate.flops import flops_per_token
from peftcli.estimate.gpus import find_gpu, unknown_gpu
from peftcli.estimate.plan import Plan
from peftcli.estimate.step_model import FUSED_LORA, TRL_DORA
from peftcli.estimate.updating import STEP_SECONDS, TENSOR_SECONDS, host_seconds, update_seconds

NAME = "llama-3.1-8b"
FLOORS = ("floor_seconds", "floor_again", "floor_adapted", "floor_magnitude", "launch_adapted")
BODY = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
HEAD = 128256 * 4096
MEASURED: list[tuple[int, Plan]] = [  # tokens per second; torch 2.11, trl 1.16
    (7725, low_rank(NAME, micro_batch=4, checkpointing=True)),
    (10956, low_rank(NAME, micro_batch=4)),
    (9732, low_rank(NAME, length=8192)),
    (7991, quantized(NAME, micro_batch=4, checkpointing=True)),
    (11322, quantized(NAME, micro_batch=4)),
]
WAITS_FOR_ITS_CPU = 4578, quantized(NAME, checkpointing=True)
LONG_ROW = 5502, quantized(NAME, length=32768, checkpointing=True)


def even(plan: Plan) -> Lengths:
    return Lengths(mean=plan.length, longest=plan.length)


@pytest.mark.parametrize(("rate", "plan"), MEASURED, ids=described)
def test_equals_steps_measured_on_an_h200(rate: int, plan: Plan) -> None:
    # TRL's own trainer; the coefficients come from steps of ours with the same layers, and these.
    seconds = step_seconds(plan, find_gpu("h200"), even(plan))
    assert plan.tokens / seconds == pytest.approx(rate, rel=0.03)


@pytest.mark.parametrize(("rate", "plan"), [*MEASURED, WAITS_FOR_ITS_CPU, LONG_ROW], ids=described)
def test_coefficients_of_its_own_meet_all_that_trls_trainer_did(rate: int, plan: Plan) -> None:
    """The form of the formula by itself: three constants, one of which differs on 4 bits."""
    own = {"adapted_traffic": 0.0, "launch_adapted": 0.0, "launch_seconds": 0.002}
    traffic = 15.0 if plan.quantization else 18.0
    trl = replace(plan, step=replace(plan.step, traffic=traffic, **own))
    seconds = step_seconds(trl, find_gpu("h200"), even(plan))
    assert plan.tokens / seconds == pytest.approx(rate, rel=0.03)


def test_a_long_row_measured_on_an_h200() -> None:
    rate, plan = LONG_ROW
    seconds = step_seconds(plan, find_gpu("h200"), even(plan))
    assert plan.tokens / seconds == pytest.approx(rate, rel=0.07)


def test_trl_takes_longer_to_start_the_kernels_of_a_short_step() -> None:
    rate, plan = WAITS_FOR_ITS_CPU
    ours = step_seconds(plan, find_gpu("h200"), even(plan))
    # Twice what our trainer needs for a layer and pass.
    slow = replace(plan, step=replace(plan.step, floor_seconds=0.003, floor_again=0.0))
    theirs = step_seconds(slow, find_gpu("h200"), even(plan))
    assert ours < theirs == pytest.approx(plan.tokens / rate, rel=0.03)


def test_flops_by_hand() -> None:
    plan = low_rank(NAME, loss="logits", targets=[])
    products, attention = flops_per_token(plan, 2048)
    assert products == 4 * (BODY + HEAD)
    assert attention == 3.5 * 2 * 4096 * 2048 * 32
    products, _ = flops_per_token(replace(plan, checkpointing=True), 2048)
    assert products == 6 * BODY + 4 * HEAD
    products, _ = flops_per_token(full(NAME, loss="logits"), 2048)
    assert products == 6 * (BODY + HEAD)


def test_only_active_experts_compute() -> None:
    dense, _ = flops_per_token(low_rank("qwen3-30b-a3b", targets=[], loss="logits"), 1)
    assert dense == pytest.approx(4 * 3.0e9, rel=0.1)  # "A3B": three billion active


def test_a_window_bounds_attention() -> None:
    _, short = flops_per_token(low_rank("mistral-7b-v0.1"), 4096)
    _, long = flops_per_token(low_rank("mistral-7b-v0.1"), 32768)
    assert short == long


def test_checkpointing_costs_about_two_fifths() -> None:
    plan = low_rank(NAME, micro_batch=4)
    gpu = find_gpu("a100")
    kept = micro_batch_seconds(plan, gpu, even(plan))
    again = micro_batch_seconds(replace(plan, checkpointing=True), gpu, even(plan))
    assert 1.3 < again / kept < 1.5


def test_padding_costs_time_and_is_no_real_token() -> None:
    plan = replace(low_rank(NAME, micro_batch=8), padded=True, batch=16)
    uneven = Lengths(mean=300, longest=2048, rows=10_000)
    assert uneven.computed(plan) > 600
    assert uneven.computed(replace(plan, micro_batch=1)) == 300
    assert uneven.computed(replace(plan, padded=False)) == 300
    found = duration(plan, find_gpu("h100"), 10, uneven)
    assert found is not None
    assert found.tokens_per_second == pytest.approx(16 * 300 / found.step_seconds)


def test_cost_follows_the_price() -> None:
    plan = quantized(NAME)
    found = duration(plan, find_gpu("h100"), 1000, even(plan), (2.60, 4.29))
    assert found is not None
    assert found.cost_usd is not None
    low, likely, high = found.seconds
    assert low < likely < high
    assert found.cost_usd == pytest.approx((low / 3600 * 2.60, high / 3600 * 4.29))
    free = duration(plan, find_gpu("h100"), 1000, even(plan))
    assert free is not None
    assert free.cost_usd is None


def test_a_card_that_was_measured_has_a_narrower_range() -> None:
    ranges = []
    for name in ("h200", "a100", "4090"):
        plan = quantized(NAME, micro_batch=2, step=FUSED_LORA)  # the GPU is busy
        found = duration(plan, find_gpu(name), 1000, Lengths(2048, 2048))
        assert found is not None
        ranges.append(found.seconds[2] / found.seconds[0])
    assert ranges == sorted(ranges)
    assert ranges[0] < 1.5


def test_dora_measures_the_weights_that_it_adapts() -> None:
    """With few tokens the GPU's time is that of the weights, in each forward pass."""
    gpu = replace(find_gpu("h200"), tflops=1e6)
    idle = dict.fromkeys(FLOORS, 0.0)
    plan = low_rank(NAME, magnitudes=True, length=1, step=replace(TRL_DORA, **idle))
    once = micro_batch_seconds(plan, gpu, even(plan))
    bandwidth = gpu.bandwidth_gb_s * 1e9
    assert once == pytest.approx(TRL_DORA.weight_traffic * BODY / bandwidth, rel=0.01)
    twice = micro_batch_seconds(replace(plan, checkpointing=True), gpu, even(plan))
    assert twice == pytest.approx(2 * once, rel=0.01)


def test_an_optimizer_that_goes_through_its_tensors_keeps_the_cpu_busy() -> None:
    """But nobody waits for that where the GPU has enough to do."""
    short = low_rank(NAME, length=16, step=FUSED_LORA)
    tensors = 2 * 7 * 32
    found = {}
    for rows in (1, 1024):
        for name in ("adamw_torch_fused", "adafactor"):
            plan = replace(short, micro_batch=rows, batch=rows, optimizer=name)
            found[rows, name] = step_seconds(plan, find_gpu("h200"), even(plan))
    more = found[1, "adafactor"] - found[1, "adamw_torch_fused"]
    assert more == pytest.approx(tensors * TENSOR_SECONDS["adafactor"])
    assert found[1024, "adafactor"] == pytest.approx(found[1024, "adamw_torch_fused"], rel=0.01)


@pytest.mark.parametrize(
    ("name", "tensors"),
    [("llama-3.2-1b", 146), ("qwen3-30b-a3b", 531), ("gpt-oss-20b", 411), ("gpt2", 148)],
)
def test_full_fine_tuning_steps_biases_and_experts_too(name: str, tensors: int) -> None:
    """As many as `len(list(model.parameters()))` in transformers 5.23."""
    spent = host_seconds(full(name, optimizer="adafactor")) - STEP_SECONDS
    assert spent == pytest.approx(tensors * TENSOR_SECONDS["adafactor"])


def test_the_update_counts_once_a_step_however_many_micro_batches_it_has() -> None:
    gpu = find_gpu("h200")
    one = full("llama-3.2-1b", micro_batch=4, batch=4)
    two = replace(one, batch=8)
    passes = micro_batch_seconds(one, gpu, even(one))
    for plan, parts in ((one, 1), (two, 2)):
        spent = step_seconds(plan, gpu, even(plan))
        assert spent == pytest.approx(parts * passes + update_seconds(plan, gpu))


def test_few_adapted_linears_move_less() -> None:
    gpu = find_gpu("h200")
    all_of_them = low_rank(NAME, micro_batch=4, step=FUSED_LORA)
    chosen = [x for x in all_of_them.targets if x.suffix in ("q_proj", "v_proj")]
    few = replace(all_of_them, targets=tuple(chosen))
    seconds = [micro_batch_seconds(x, gpu, even(x)) for x in (all_of_them, few)]
    assert seconds[1] < 0.95 * seconds[0]


@pytest.mark.parametrize("magnitudes", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("tflops", [None, 1e6], ids=["busy GPU", "busy CPU"])
def test_a_tower_for_images_takes_no_time_of_text(tflops: float | None, magnitudes: bool) -> None:
    """Its linears have factors too, through which no token of text goes."""
    gpu = find_gpu("h200")
    gpu = replace(gpu, tflops=tflops, bandwidth_gb_s=1e9) if tflops else gpu
    plan = low_rank("gemma-3-4b", micro_batch=8, magnitudes=magnitudes)
    text = replace(plan, targets=tuple(x for x in plan.targets if x.kind != "vision"))
    assert len(text.targets) < len(plan.targets)
    assert micro_batch_seconds(plan, gpu, even(plan)) == micro_batch_seconds(text, gpu, even(text))


@pytest.mark.parametrize(
    ("name", "billions"), [("llama-3.2-1b", 1.236), ("mixtral-8x7b", 46.57), ("gemma-3-4b", 3.88)]
)
def test_full_fine_tuning_moves_experts_too_but_no_tower_for_images(
    name: str, billions: float
) -> None:
    """All that a token can pass; embeddings are looked up, but where they are the head too."""
    plan, gpu = full(name, micro_batch=16), find_gpu("h200")  # the GPU is busy
    free = replace(plan, step=replace(plan.step, trained_traffic=0.0))
    spent = [micro_batch_seconds(x, gpu, even(x)) for x in (plan, free)]
    moved = (spent[0] - spent[1]) * gpu.bandwidth_gb_s * 1e9
    assert moved == pytest.approx(plan.step.trained_traffic * billions * 1e9, rel=0.01)


def test_eager_attention_computes_and_moves_every_pair_of_tokens() -> None:
    plan = low_rank("gemma-2-9b", length=8192, attention="eager")
    packed = Lengths(8192, 8192, packed=512)
    assert plan.kernel == "eager"
    _, of_a_window = flops_per_token(replace(plan, attention="flash"), 8192)
    assert flops_per_token(plan, 8192)[1] == 2 * 8192 / 4096 * of_a_window
    alone, among = (step_seconds(plan, find_gpu("h200"), x) for x in (even(plan), packed))
    assert among == alone
    half = step_seconds(plan, find_gpu("h200"), Lengths(4096, 8192))
    assert 0.25 * alone < half < 0.45 * alone
    free = replace(plan, step=replace(plan.step, scores_traffic=0.0))
    assert step_seconds(free, find_gpu("h200"), even(plan)) < 0.7 * alone


def test_nothing_is_said_about_an_unknown_card() -> None:
    assert duration(quantized(NAME), unknown_gpu(24), 10, Lengths(100, 100)) is None
