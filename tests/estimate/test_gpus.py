"""GPUs are found by the names that people and PyTorch use."""

from __future__ import annotations

import pytest

from peftcli.errors import UsageError
from peftcli.estimate.gpus import GPUS, device_gpu, find_gpu


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("h100", "H100 SXM"),
        ("NVIDIA H200", "H200"),
        ("a100", "A100 80GB"),
        ("A100-40GB", "A100 40GB"),
        ("4090", "RTX 4090"),
        ("rtx 4090", "RTX 4090"),
        ("RTX6000Ada", "RTX 6000 Ada"),
        ("t4", "T4"),
        ("24GB", "GPU with 24 GiB"),
        ("11", "GPU with 11 GiB"),
    ],
)
def test_find(written: str, name: str) -> None:
    assert find_gpu(written).name == name


@pytest.mark.parametrize(
    ("device", "gib", "name"),
    [
        ("NVIDIA H200", 139.8, "H200"),
        ("NVIDIA A100-SXM4-80GB", 79.3, "A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", 39.5, "A100 40GB"),
        ("NVIDIA H100 80GB HBM3", 79.6, "H100 SXM"),
        ("NVIDIA H100 PCIe", 79.6, "H100 PCIe"),
        ("NVIDIA GeForce RTX 4090", 23.6, "RTX 4090"),
        ("Tesla V100-SXM2-32GB", 31.7, "V100 32GB"),
        ("NVIDIA L40S", 44.5, "L40S"),
        ("NVIDIA L4", 22.0, "L4"),
        ("NVIDIA A10G", 22.0, "A10G"),
        ("NVIDIA GeForce RTX 3070", 8.0, "GPU with 8 GiB"),
    ],
)
def test_device_keeps_its_own_memory(device: str, gib: float, name: str) -> None:
    found = device_gpu(device, gib)
    assert found.name == name
    assert found.memory / 2**30 == pytest.approx(gib, abs=0.001)


@pytest.mark.parametrize("written", ["", "toaster", "0", "0GB", "-5GB", "nan", "9999999"])
def test_unknown_cards_are_refused(written: str) -> None:
    with pytest.raises(UsageError, match="not in the table"):
        find_gpu(written)


def test_near_names_are_offered() -> None:
    with pytest.raises(UsageError) as caught:
        find_gpu("rtx 4091")
    assert "RTX 4090" in caught.value.hint


def test_rows_are_sane() -> None:
    assert len({gpu.name for gpu in GPUS}) == len(GPUS)
    for gpu in GPUS:
        assert 10_000 < gpu.memory_mib < 200_000
        assert 0.3 <= gpu.attained <= 0.9
        if gpu.price_per_hour_usd:
            low, high = gpu.price_per_hour_usd
            assert 0.1 < low <= high < 15
