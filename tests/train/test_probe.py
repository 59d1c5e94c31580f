"""What the longest rows cost before the first step, and that the evaluation's are among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from peftcli.events import Event, Note
from peftcli.recipe.document import Document
from peftcli.recipe.load import validate
from peftcli.train.batches import Batches
from peftcli.train.probe import fullest
from peftcli.train.run import Options, run


def passes(base: Path, rows: Path, output: Path, **evaluation: object) -> list[tuple[bool, int]]:
    """Every forward pass of the probe: whether it trains, and its tokens."""
    seen: list[tuple[bool, int]] = []
    probed: list[tuple[bool, int]] = []

    def hook(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, torch.nn.Embedding):
            seen.append((torch.is_grad_enabled(), inputs[0].numel()))

    def tell(event: Event) -> None:
        if isinstance(event, Note) and "longest batch fits" in event.text:
            probed.extend(seen)

    values = {
        "model": str(base),
        "method": {"name": "lora", "rank": 4},
        "data": {"train": str(rows), "eval": 0.2, "max_length": 64},
        "training": {"batch_size": 8, "micro_batch_size": 1, "max_steps": 1, "device": "cpu"},
        "evaluation": evaluation,
        "output": str(output),
    }
    handle = register_module_forward_pre_hook(hook)
    try:
        run(validate(Document("test.yaml", values)), Options(probe_on_cpu=True), tell)
    finally:
        handle.remove()
    return probed


def test_it_costs_two_micro_batches_and_an_evaluation_of_the_real_size(
    base_model: Path, rows: Path, tmp_path: Path
) -> None:
    alone = passes(base_model, rows, tmp_path / "alone")
    together = passes(base_model, rows, tmp_path / "together", batch_size=4)
    assert [trains for trains, _ in alone] == [trains for trains, _ in together]
    assert [trains for trains, _ in alone] == [True, True, False]
    assert together[2][1] > 3 * alone[2][1]


@pytest.mark.parametrize("apart", [True, False])
def test_the_fullest_micro_batches_are_chosen(apart: bool) -> None:
    lengths = [10, 8, 6, 6, 5, 3, 3]
    rows = [{"input_ids": [5] * n, "labels": [5] * n} for n in lengths]
    step = Batches(0, micro_batch_size=2, longest=10, apart=apart)(rows)
    sizes = [part["input_ids"].numel() for part in step["micro_batches"]]
    chosen = fullest(step)
    assert chosen["trained_tokens"] == step["trained_tokens"]
    assert [part["input_ids"].numel() for part in chosen["micro_batches"]] == (
        sorted(sizes, reverse=True)[:2]
    )
    assert sizes != sorted(sizes, reverse=True) or not apart
