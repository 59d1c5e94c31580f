"""The closed form against measured peaks, and against the allocations of the real graph.

GRAPH: peaks of PyTorch's allocated bytes found by running transformers 5.23, peft 0.21 and trl
1.16 on tensors without storage and following every allocation (bf16 autocast, dense SDPA). Its
attention ran outside autocast, so float32 weights without checkpointing are in test_float32.py.
TIED: autograd adds the second gradient of a tied weight in place, but not to a tensor without
storage, so these peaks hold one more tensor of the embedding's size than a real run.
H200: measured, torch 2.11, trl 1.16.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from estimate_plans import FUSED, QKVO, described, full, houlsby, low_rank, model, quantized
from hypothesis import given, settings
from hypothesis import strategies as st

from peftcli import fp8
from peftcli.estimate.facts import plan_of
from peftcli.estimate.fit import need
from peftcli.estimate.gpus import find_gpu
from peftcli.estimate.groups import CODED_AT_ONCE
from peftcli.estimate.layer import kept_tensors
from peftcli.estimate.loading import loading_peak
from peftcli.estimate.memory import GIB, training_peak
from peftcli.estimate.plan import Plan
from peftcli.estimate.step_model import FUSED_FP8, TRL_DORA_QUANTIZED
from peftcli.estimate.transients import attention_backward
from peftcli.estimate.weights import weights
from peftcli.estimate.widths import Widths, layer_kinds
from peftcli.recipe.schema import Recipe

CK = {"checkpointing": True}
GRAPH: list[tuple[float, Plan]] = [
    (14.093, low_rank("llama-2-7b", **CK)),
    (13.218, low_rank("llama-2-7b", targets=QKVO, length=1024, **CK)),
    (13.842, houlsby("llama-2-7b", **CK)),
    (50.221, full("llama-2-7b", **CK)),
    (16.587, low_rank("llama-3.1-8b", **CK)),
    (29.020, low_rank("llama-3.1-8b")),
    (18.080, low_rank("llama-3.1-8b", attention="eager", **CK)),
    (16.770, low_rank("llama-3.1-8b", dropout=True, **CK)),
    (31.449, low_rank("llama-3.1-8b", dropout=True)),
    (25.071, houlsby("llama-3.1-8b")),
    (19.185, houlsby("llama-3.1-8b", micro_batch=4, **CK)),
    (18.156, low_rank("qwen3-8b", micro_batch=2, **CK)),
    (16.951, low_rank("qwen3-0.6b", micro_batch=8, length=1024)),
    (2.106, low_rank("qwen2.5-0.5b", micro_batch=8, length=1024, **CK)),
    (4.354, low_rank("llama-3.2-1b", micro_batch=4, **CK)),
    (17.275, low_rank("llama-3.2-1b", micro_batch=4)),
    (7.340, low_rank("llama-3.2-1b", micro_batch=4, base_bytes=4, **CK)),
    (19.909, full("qwen3-0.6b", micro_batch=4)),
    (19.660, low_rank("gemma-2-9b", attention="eager", **CK)),
    (2.419, low_rank("gemma-3-1b", **CK)),
    (8.206, low_rank("phi-3-mini", **CK)),
]
TIED: list[tuple[float, Plan]] = [
    (10.268, full("llama-3.2-1b", micro_batch=4, **CK)),
    (8.002, full("llama-3.2-1b", micro_batch=4, optimizer="adamw_8bit", **CK)),
    (20.372, full("llama-3.2-1b", micro_batch=4, base_bytes=4, **CK)),
    (10.041, full("qwen3-0.6b", micro_batch=4, base_bytes=4, **CK)),
]
QUANTIZED_GRAPH: list[tuple[float, Plan]] = [
    (4.282, quantized("llama-2-7b", length=512, **CK)),
    (4.948, quantized("llama-2-7b", **CK)),
    (6.739, quantized("llama-3.1-8b", **CK)),
    (7.038, quantized("llama-3.1-8b", double_quantization=False, **CK)),
    (17.162, quantized("llama-3.1-8b")),
    (13.524, quantized("llama-3.1-8b", micro_batch=2, length=8192, **CK)),
    (13.528, quantized("llama-3.1-8b", length=16384, **CK)),
    (14.465, quantized("llama-3.1-8b", length=16384, attention="masked", **CK)),
    (9.170, quantized("llama-3.1-8b", loss="logits", **CK)),
    (6.855, quantized("llama-3.1-8b", dropout=True, **CK)),
    (21.514, quantized("llama-3.1-8b", dropout=True)),
    (6.819, quantized("llama-3.1-8b", adapter_bytes=4, **CK)),
    (17.318, quantized("llama-3.1-8b", adapter_bytes=4)),
    (13.604, quantized("llama-3.1-8b", adapter_bytes=4, micro_batch=2, length=8192, **CK)),
    (4.835, quantized("llama-3.2-3b", micro_batch=2, length=4096, **CK)),
    (42.523, quantized("llama-3.1-70b", **CK)),
    (8.025, quantized("gemma-2-9b", attention="eager", **CK)),
    (1.356, quantized("gemma-3-1b", **CK)),
    (3.094, quantized("phi-3-mini", **CK)),
]


@pytest.mark.parametrize(("gib", "plan"), TIED, ids=described)
def test_tied_weights_are_summed_in_place(gib: float, plan: Plan) -> None:
    once = plan.adapter_bytes * plan.architecture.vocab_size * plan.architecture.hidden_size / GIB
    assert 0.988 * (gib - once) < training_peak(plan).size / GIB < gib
    if plan.base_bytes == 4:  # as `train` holds them; in 16 bits another moment is the fullest
        assert training_peak(plan).size / GIB == pytest.approx(gib - once, rel=0.012)


@pytest.mark.parametrize(("gib", "plan"), GRAPH, ids=described)
def test_equals_the_real_graph(gib: float, plan: Plan) -> None:
    assert training_peak(plan).size / GIB == pytest.approx(gib, rel=0.012)


@pytest.mark.parametrize(("gib", "plan"), QUANTIZED_GRAPH, ids=described)
def test_equals_the_real_graph_on_four_bits(gib: float, plan: Plan) -> None:
    peak = training_peak(plan)
    # The graph has every optimizer state on the GPU; paged ones are outside our peak.
    assert (peak.size + peak.paged) / GIB == pytest.approx(gib, rel=0.02)


H200: list[tuple[float, Plan]] = [
    (20.1, low_rank("llama-3.1-8b", micro_batch=4, **CK)),
    (69.6, low_rank("llama-3.1-8b", micro_batch=4)),
    (69.6, low_rank("llama-3.1-8b", length=8192)),
    (9.5, quantized("llama-3.1-8b", micro_batch=4, **CK)),
    (51.3, quantized("llama-3.1-8b", micro_batch=4)),
    (6.64, quantized("llama-3.1-8b", **CK)),
    (21.3, quantized("llama-3.1-8b", length=32768, **CK)),
    (49.8, low_rank("llama-3.1-8b", micro_batch=4, adapter_bytes=2, step=FUSED)),
    (
        40.1,
        quantized("llama-3.1-8b", micro_batch=4, optimizer="adamw_torch", step=FUSED),
    ),
    (38.5, replace(low_rank("llama-3.1-8b", micro_batch=4, targets=[]), step=FUSED)),
]


@pytest.mark.parametrize(("gib", "plan"), H200, ids=described)
def test_equals_peaks_measured_on_an_h200(gib: float, plan: Plan) -> None:
    peak = training_peak(plan).size + 2 * find_gpu("h200").workspace  # TRL's two threads
    assert peak / GIB == pytest.approx(gib, rel=0.005)


def test_parts_add_up_and_are_explained() -> None:
    peak = training_peak(quantized("llama-3.1-8b", micro_batch=4))
    assert sum(part.size for part in peak.parts) == peak.size
    assert all(part.size > 0 and part.formula for part in peak.parts)
    assert {"base, 4-bit", "activations", "logits"} <= {part.name for part in peak.parts}


def test_four_bit_weights_by_hand() -> None:
    plan = quantized("llama-3.1-8b")
    elements = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    held = weights(plan)
    assert held.quantized == elements * (0.5 + 1 / 64 + 4 / 16384) + 7 * 32 * 2048
    assert held.plain == 2 * (2 * 128256 * 4096 + 65 * 4096)
    assert held.paged == 8 * 32 * 16 * (14336 * 3)  # only B of gate and up, A of down: 229,376


def test_experts_are_not_quantised() -> None:
    held = weights(quantized("mixtral-8x7b"))
    assert held.plain > 2 * sum(x.parameters() for x in model("mixtral-8x7b").experts)


def test_loading_holds_one_weight_in_16_bits() -> None:
    plan = quantized("llama-3.1-8b")
    assert loading_peak(plan) == weights(plan).base() + 2 * 14336 * 4096
    plan = low_rank("llama-3.1-8b")
    assert loading_peak(plan) == weights(plan).base()


def test_a_base_for_fp8_is_turned_as_the_estimate_says() -> None:
    assert CODED_AT_ONCE == fp8.PART
    plan = replace(low_rank("llama-3.1-8b"), step=FUSED_FP8, quantization="fp8")
    group, freed = 2 * 14336 * 4096, 4096 * (4096 + 2 * 1024) + 4096**2
    factors = 2 * (48 * (4096 + 6144) + 16 * 2 * 4096 + 32 * (4096 + 2 * 14336))
    turning = group - freed + factors + 9 * 2**24
    whole = weights(replace(plan, quantization=None)).base()
    assert loading_peak(plan) == whole + 4 * plan.trainable + turning


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["llama-3.2-1b", "qwen3-30b-a3b", "gpt2", "nemotron-3-nano-30b", "phi-4"]),
    st.sampled_from([low_rank, quantized, houlsby, full]),
    st.integers(1, 8),
    st.integers(16, 4096),
    st.sampled_from(["flash", "masked", "eager"]),
    st.booleans(),
)
def test_more_tokens_never_need_less(
    name: str, method: Any, rows: int, length: int, attention: str, checkpointing: bool
) -> None:
    plan = method(name, length=length, attention=attention, checkpointing=checkpointing)
    peak = training_peak(plan).size
    assert training_peak(replace(plan, micro_batch=rows, batch=rows)).size >= peak
    assert training_peak(replace(plan, length=length + 1)).size >= peak
    assert training_peak(replace(plan, batch=8)).size >= peak
    assert peak > weights(plan).base()


def test_unfused_adamw_makes_the_roots_of_all_second_moments_at_once() -> None:
    plan = full("llama-3.2-1b", checkpointing=True)
    fused, plain = (
        training_peak(replace(plan, optimizer=name))
        for name in ("adamw_torch_fused", "adamw_torch")
    )
    assert plain.moment == "optimizer step"
    kinds = {part.name: part.size for part in plain.parts}
    assert kinds["roots of the second moments"] == weights(plan).gradients
    assert plain.size > fused.size


def test_weights_that_autocast_copies_are_there_while_the_last_layer_is_computed() -> None:
    """Many tokens make that moment the fullest where gradients of an earlier micro-batch wait."""
    few = full("qwen2.5-3b", base_bytes=4, micro_batch=2, batch=4, **CK)
    many = replace(few, length=8192)
    assert training_peak(few).moment != "forward pass of the last layer"
    peak = training_peak(many)
    assert peak.moment == "forward pass of the last layer"
    assert peak.size / GIB == pytest.approx(56.917, rel=0.005)  # as it was measured


def test_an_eager_kernel_keeps_no_output_that_nobody_reads() -> None:
    """LoRA's output projection keeps a copy of its own; on 4 bits it shares."""
    widths = {}
    for name, plan in {
        "lora": low_rank("gemma-2-2b", attention="eager"),
        "lora, flash": low_rank("gemma-2-2b"),
        "qlora": quantized("gemma-2-2b", attention="eager"),
        "full": full("gemma-2-2b", attention="eager"),
    }.items():
        (kind,) = layer_kinds(plan.architecture)
        widths[name] = kept_tensors(plan, kind)["queries and attention output"]
    query = 8 * 256
    assert widths == {
        "lora": 2 * query,
        "lora, flash": 4 * query + 4 * 8,
        "qlora": 4 * query,
        "full": 4 * query,
    }


def test_without_flash_attention_shared_key_heads_are_kept_repeated() -> None:
    """Before Ampere and in float32; each key and value has 4 query heads and 16 bits."""
    plans = [low_rank("llama-3.1-8b", attention=kernel) for kernel in ("flash", "efficient")]
    (kind,) = layer_kinds(plans[0].architecture)
    flash, efficient = (sum(kept_tensors(plan, kind).values()) for plan in plans)
    assert efficient - flash == 2 * 2 * (4096 - 1024)
    keys = {"model": {"name": "x"}, "data": {"train": "rows.jsonl"}, "output": "run"}
    found = {}
    cases = (
        ("T4", {}), ("3060", {}), ("3060", {"dtype": "float32"}),
        ("T4", {"attention": "sdpa"}), ("3060", {"attention": "sdpa"}),
    )  # fmt: skip
    for gpu, own in cases:
        model = {"name": "x", **own}
        recipe = Recipe.model_validate({**keys, "method": {"name": "lora"}, "model": model})
        plan = plan_of(recipe, plans[0].architecture, find_gpu(gpu), length=2048, packing=False)
        found[gpu, *own.values()] = plan.kernel
    assert found == {
        ("T4",): "efficient",
        ("3060",): "flash",
        ("3060", "float32"): "efficient",
        ("T4", "sdpa"): "eager",  # transformers repeats no keys: the scores are held
        ("3060", "sdpa"): "flash",
    }


def test_going_back_through_the_first_layer_all_gradients_are_there() -> None:
    """Beside its feed-forward block with many tokens, and beside scores of all pairs of tokens."""
    wide = full("qwen2.5-3b", base_bytes=4, micro_batch=8, optimizer="adamw_8bit", flat=True, **CK)
    peak = training_peak(wide)
    assert peak.moment == "backward of the feed-forward block, first layer"
    assert peak.size / GIB == pytest.approx(33.601, rel=0.01)  # as it was measured
    eager = full("gemma-2-2b", base_bytes=4, length=8192, attention="eager", optimizer="lion_32bit")
    peak = training_peak(replace(eager, checkpointing=True))
    assert peak.moment == "backward of attention, first layer"
    assert peak.size / GIB == pytest.approx(38.938, rel=0.01)


def test_doras_scaled_outputs_are_there_beside_the_scores() -> None:
    plan = low_rank("gemma-2-9b", attention="eager", length=8192, micro_batch=2, **CK)
    step = TRL_DORA_QUANTIZED
    dora = replace(plan, magnitudes=True, step=step)
    without = replace(dora, step=replace(step, kept_scaled=0.0))
    sizes = [sum(x.size for x in attention_backward(p, kind_of(p))) for p in (dora, without)]
    read = 16 * 256 + 2 * 8 * 256  # queries, keys and values
    assert sizes[0] - sizes[1] == plan.tokens * step.kept_scaled * read


def test_adafactor_keeps_the_means_of_rows_and_columns() -> None:
    plan = replace(low_rank("llama-3.2-1b", targets=["q_proj"]), optimizer="adafactor")
    assert weights(plan).states == 16 * 4 * (2048 + 2048 + 2 * plan.rank)
    assert weights(replace(plan, magnitudes=True)).states - weights(plan).states == 16 * 4 * 2048
    told = {part.name: part.formula for part in training_peak(plan).parts}["optimizer states"]
    assert "4 B for each row and column" in told
    assert f"{plan.trainable:,}" not in told


def test_the_allocator_holds_more_beside_scores_and_less_beside_dropout() -> None:
    card = find_gpu("h200")
    shares = {}
    for name, plan in {
        "scores": low_rank("gemma-2-9b", attention="eager", length=8192, **CK),
        "layers": low_rank("llama-3.1-8b", micro_batch=16, **CK),
        "dropout": low_rank("llama-3.1-8b", micro_batch=16, dropout=True, **CK),
    }.items():
        found = need(plan, card)
        shares[name] = (found.reserved - found.step) / training_peak(plan).passing
    assert shares == pytest.approx({"scores": 0.23, "layers": 0.13, "dropout": 0.09})


def kind_of(plan: Plan) -> Widths:
    (kind,) = layer_kinds(plan.architecture)
    return kind


def test_a_window_without_flash_attention_is_a_mask() -> None:
    mistral = replace(model("mistral-7b-v0.3"), sliding_window=1024)
    keys = {"model": {"name": "x"}, "data": {"train": "rows.jsonl"}, "output": "run"}
    recipe = Recipe.model_validate({**keys, "method": {"name": "lora"}})
    kernels = {
        (gpu, length): plan_of(recipe, mistral, find_gpu(gpu), length=length, packing=False).kernel
        for gpu in ("T4", "3060")
        for length in (1024, 2048)
    }
    assert kernels == {
        ("T4", 1024): "efficient",
        ("T4", 2048): "masked",
        ("3060", 1024): "flash",
        ("3060", 2048): "flash",
    }
