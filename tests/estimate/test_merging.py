"""The host memory of merges, as scripts/benchmark_merge measured it, against today's estimates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peftcli.architecture.catalog import find_config
from peftcli.architecture.config import architecture_from
from peftcli.estimate.merging import merge_estimate

FILE = Path(__file__).with_name("merges.jsonl")
MERGES: list[dict[str, Any]] = [json.loads(line) for line in FILE.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("merge", MERGES, ids=[f"{x['model']} {x['base']}" for x in MERGES])
def test_host_memory(merge: dict[str, Any]) -> None:
    config = find_config(merge["model"])
    assert config is not None
    rounded = merge["base"] == "dequantized"
    found = merge_estimate(architecture_from(config), merge["adapter_values"], rounded=rounded)
    error = found.host_gib / merge["resident_gib"] - 1
    assert abs(error) < 0.06


def test_weights_that_are_stored_the_other_way_are_held_whole() -> None:
    """GPT-2's Conv1D: six layers of 2,048 took 0.955 GiB after QLoRA, on two CPU cores."""
    shape = {"model_type": "gpt2", "n_embd": 2048, "n_layer": 6, "n_head": 16, "vocab_size": 2048}
    architecture = architecture_from({**shape, "n_positions": 128})
    plain, rounded = (
        merge_estimate(architecture, 2_000_000, rounded=rounded).host_gib
        for rounded in (False, True)
    )
    assert rounded - plain == pytest.approx(2 * 18 * 2048 * 4 * 2048 / 2**30)
    assert 0.955 < rounded < 1.4
