"""What a run holds in memory: now, at its peak, and in which part."""

from __future__ import annotations

import resource
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import torch

from peftcli.machine import free_host_memory
from peftcli.models import Device

GIB = 2**30
HOST_SPARE_GIB = 2.0  # what a run holds of the machine beside inputs: a checkpoint, rows, CUDA


def peak_memory_gib() -> float:
    """Peak of allocated GPU memory, or peak resident memory where there is no GPU, in GiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def host_room_gib() -> float:
    """Host memory that inputs of layers may take now, in GiB."""
    return max(0.0, free_host_memory() / GIB - HOST_SPARE_GIB)


def reset_peaks(device: Device) -> None:
    """Count peaks from here on."""
    if device.kind == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak(device: Device) -> float | None:
    """The peak of allocated memory since `reset_peaks`, in GiB."""
    return torch.cuda.max_memory_allocated() / GIB if device.kind == "cuda" else None


def allocated(device: Device) -> float | None:
    """What is allocated now, in GiB."""
    return torch.cuda.memory_allocated() / GIB if device.kind == "cuda" else None


@dataclass(frozen=True)
class OwnMemory:
    """What is held beyond the `others` GiB that this process held before; None without a GPU."""

    device: Device
    others: float

    def peak(self) -> float | None:
        """The peak since `reset_peaks`, in GiB."""
        return self._own(peak(self.device))

    def allocated(self) -> float | None:
        """What is allocated now, in GiB."""
        return self._own(allocated(self.device))

    def _own(self, size: float | None) -> float | None:
        return None if size is None else size - self.others


def card_memory() -> float | None:
    """What nvidia-smi says is used of the first card, in GiB; None where it is not installed."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    first = done.stdout.split()
    return int(first[0]) / 1024 if first and first[0].isdigit() else None


def synchronize(device: Device) -> None:
    """Wait until the GPU has done what it was given."""
    if device.kind == "cuda":
        torch.cuda.synchronize()


def frozen_gib(model: torch.nn.Module) -> float:
    """The weights that are not trained, in GiB."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return sum(p.numel() * p.element_size() for p in frozen) / GIB


def state_bytes(optimizer: Any) -> tuple[int, int]:
    """Bytes of optimizer states: those that PyTorch allocated, and those that are paged."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    plain = paged = 0
    for state in inner.state.values():
        for value in state.values():
            if not isinstance(value, torch.Tensor):
                continue
            if getattr(value, "is_paged", False):  # bitsandbytes marks managed memory so
                paged += value.nbytes
            elif value.device.type == "cuda":
                plain += value.nbytes
    return plain, paged
