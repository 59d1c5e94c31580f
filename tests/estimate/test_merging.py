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
