"""The fastest setting that fits, and the most that does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from estimate_plans import low_rank, quantized

from peftcli.estimate.duration import Lengths
from peftcli.estimate.facts import fused_step_of
from peftcli.estimate.fit import (
    MOST,
    candidates,
    choose,
    gpus_that_fit,
    largest_micro_batch,
    longest_row,
    need,
    verdict,
)
from peftcli.estimate.gpus import GIB, find_gpu, unknown_gpu
from peftcli.estimate.memory import training_peak

NAME = "llama-3.1-8b"


def test_a_large_card_needs_no_checkpointing() -> None:
    plan = choose(candidates(low_rank(NAME, batch=16)), find_gpu("h200"))
    assert plan is not None
    assert not plan.checkpointing
    assert plan.micro_batch >= 4


def test_the_fastest_that_fits_is_chosen() -> None:
    gpu = find_gpu("4090")
    plans = candidates(quantized(NAME, batch=8))
    chosen = choose(plans, gpu)
    assert chosen is not None
    assert verdict(chosen, gpu) == "fits"
    roomy = choose(plans, find_gpu("h200"))
    assert roomy is not None
    assert not roomy.checkpointing


def test_memory_taken_by_others_counts() -> None:
    gpu, plans = find_gpu("24GB"), candidates(quantized(NAME, batch=4))
    alone = choose(plans, gpu)
    shared = choose(plans, gpu, reserved=14 * GIB)
    assert alone is not None
    assert shared is not None
    assert training_peak(shared).size < training_peak(alone).size
    assert choose(plans, gpu, reserved=20 * GIB) is None


def test_fixed_values_stay() -> None:
    plans = candidates(quantized(NAME, batch=8), micro_batch=2, mode="full")
    assert [(plan.micro_batch, plan.checkpointing) for plan in plans] == [(2, True)]


def test_micro_batches_divide_the_batch() -> None:
    assert {plan.micro_batch for plan in candidates(quantized(NAME, batch=12))} == {
        1,
        2,
        3,
        4,
        6,
        12,
    }


def test_padding_makes_small_micro_batches_attractive() -> None:
    plan = replace(low_rank("llama-3.2-1b", batch=64, length=4096), padded=True)
    plans = candidates(plan, mode="none")
    gpu = find_gpu("h200")
    even = choose(plans, gpu, lengths=Lengths(4096, 4096))
    uneven = choose(plans, gpu, lengths=Lengths(200, 4096, rows=1000))
    assert even is not None
    assert uneven is not None
    assert uneven.micro_batch <= even.micro_batch


@pytest.mark.parametrize("name", ["mixtral-8x7b", "gpt2"])
def test_unchecked_families_get_a_wide_band(name: str) -> None:
    low, likely, high = need(low_rank(name), find_gpu("h100")).allocated
    assert low < 0.9 * likely
    assert high > 1.15 * likely


def test_the_most_that_fits_is_the_most() -> None:
    gpu, plan = find_gpu("24GB"), quantized(NAME, checkpointing=True)
    rows, length = largest_micro_batch(plan, gpu), longest_row(plan, gpu)
    assert rows > 1
    assert verdict(replace(plan, micro_batch=rows, batch=rows), gpu) == "fits"
    assert verdict(replace(plan, micro_batch=rows + 1, batch=rows + 1), gpu) != "fits"
    assert length % 64 == 0
    assert verdict(replace(plan, length=length), gpu) == "fits"
    assert verdict(replace(plan, length=length + 64), gpu) != "fits"


def halving(fits: Callable[[int], bool]) -> int:
    """The same by the plainest search."""
    low, high = 0, 2 * MOST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@pytest.mark.parametrize("gib", [12, 24, 140, 10**6])
@pytest.mark.parametrize("change", [{}, {"attention": "eager"}, {"padded": True, "loss": "logits"}])
@pytest.mark.parametrize("name", [NAME, "mixtral-8x7b", "gemma-2-2b"])
def test_the_most_is_what_halving_finds(name: str, change: dict[str, Any], gib: int) -> None:
    gpu, plan = unknown_gpu(gib), replace(low_rank(name), **change)

    def rows(n: int) -> bool:
        return verdict(replace(plan, micro_batch=n, batch=n), gpu) == "fits"

    def length(n: int) -> bool:
        return verdict(replace(plan, micro_batch=1, length=64 * n), gpu) == "fits"

    assert largest_micro_batch(plan, gpu) == halving(rows)
    assert longest_row(plan, gpu) == 64 * halving(length)


def test_the_most_needs_few_tries() -> None:
    training_peak.cache_clear()
    assert longest_row(quantized(NAME, checkpointing=True), find_gpu("24GB")) > 10_000
    assert training_peak.cache_info().misses <= 9  # halving takes 18


def test_what_is_kept_of_one_plan_is_not_taken_for_another() -> None:
    plan = low_rank(NAME)
    others = {"quantization": "nf4", "attention": "eager", "loss": "logits", "base_bytes": 4}
    sizes = {training_peak(replace(plan, **{key: value})).size for key, value in others.items()}
    assert len(sizes | {training_peak(plan).size}) == 5
    assert training_peak(replace(plan)) is training_peak(plan)


def test_nothing_is_the_most_where_nothing_fits() -> None:
    gpu, plan = find_gpu("24GB"), quantized("llama-3.1-405b", checkpointing=True)
    assert largest_micro_batch(plan, gpu) == 0
    assert longest_row(plan, gpu) == 0
    assert gpus_that_fit(plan) == []


def test_cheapest_cards_first() -> None:
    names = [gpu.name for gpu in gpus_that_fit(low_rank(NAME, checkpointing=True))]
    assert names[0] == "RTX 3090"
    assert "T4" not in names
    assert "RTX 3060" not in names


def test_a_card_known_by_memory_alone_can_choose() -> None:
    assert choose(candidates(quantized(NAME, batch=4)), unknown_gpu(24)) is not None


def test_cards_that_cannot_run_the_plan_are_not_named() -> None:
    plain = low_rank("llama-3.2-1b")
    fused = replace(plain, step=fused_step_of(plain))
    fp8 = replace(fused, quantization="fp8")
    names = [{gpu.name for gpu in gpus_that_fit(plan)} for plan in (plain, fused, fp8)]
    assert names[0] - names[1] == {"T4", "V100 16GB", "V100 32GB"}
    assert "A100 40GB" in names[1] - names[2]
    assert {"RTX 4090", "H100 SXM"} <= names[2]
