"""GPUs that people tune on: memory, rates and prices. A new GPU is one row.

Memory is what NVML shows. TFLOP/s are dense bfloat16 with float32 accumulation (float16 where the
card has no bfloat16). Prices per hour stand in prices.csv; cards that one owns have none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from peftcli.errors import UsageError
from peftcli.estimate.prices import prices

Speed = Literal["measured", "published", "data sheet"]
MIB = 2**20
GIB = 2**30
FP8_FROM = 89  # compute capability times ten: Ada, Hopper and later
FLASH_FROM = 80  # the same: Ampere and later


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU. `compute` is the compute capability times ten, `attained` the share of the
    peak rate that large matrix products reach; `speed` says where that share comes from."""

    name: str
    memory_mib: int
    bandwidth_gb_s: float
    tflops: float
    compute: int
    attained: float = 0.8
    speed: Speed = "data sheet"

    @property
    def price_per_hour_usd(self) -> tuple[float, float] | None:
        """Lowest and highest price of the table; None for cards that one owns."""
        found = prices().get(self.name)
        return (found.low, found.high) if found else None

    @property
    def memory(self) -> float:
        """Bytes that NVML shows."""
        return self.memory_mib * MIB

    @property
    def has_bfloat16(self) -> bool:
        return self.compute >= 80

    @property
    def has_flash(self) -> bool:
        """Whether PyTorch's flash attention runs on it."""
        return self.compute >= FLASH_FROM

    @property
    def has_fp8(self) -> bool:
        """Whether it multiplies in fp8."""
        return self.compute >= FP8_FROM

    @property
    def context(self) -> float:
        """Bytes that CUDA and its loaded kernels take.

        Measured on a T4, and on an H100 (768 to 910 MiB, more with each kind of kernel); assumed
        between the two on others.
        """
        return (141 if self.compute < 80 else 400 if self.compute < 90 else 800) * MIB

    @property
    def workspace(self) -> float:
        """Bytes of the workspace that cuBLAS has for a thread."""
        return (32 if self.compute >= 90 else 8.125) * MIB


HOPPER = 0.71  # 695 to 803 TFLOP/s of 989 measured on an H200, 2026-11
GPUS: tuple[Gpu, ...] = (
    Gpu("T4", 15360, 320, 65, 75, attained=0.35, speed="published"),
    Gpu("V100 16GB", 16384, 900, 125, 70, attained=0.6),
    Gpu("V100 32GB", 32768, 900, 125, 70, attained=0.6),
    Gpu("RTX 3060", 12288, 360, 26, 86),
    Gpu("RTX 3090", 24576, 936, 71, 86),
    Gpu("RTX 4060 Ti 16GB", 16380, 288, 44, 89),
    Gpu("RTX 4070 Ti Super", 16376, 672, 88, 89),
    Gpu("RTX 4080", 16376, 717, 98, 89),
    Gpu("RTX 4090", 24564, 1008, 165, 89),
    Gpu("RTX 5080", 16303, 960, 113, 120),
    Gpu("RTX 5090", 32607, 1792, 210, 120),
    Gpu("L4", 23034, 300, 121, 89, attained=0.5),
    Gpu("A10", 23028, 600, 125, 86, attained=0.6),
    Gpu("A10G", 23028, 600, 70, 86),
    Gpu("A40", 46068, 696, 150, 86),
    Gpu("RTX A6000", 49140, 768, 155, 86),
    Gpu("RTX 6000 Ada", 49140, 960, 364, 89, attained=0.6),
    Gpu("L40S", 46068, 864, 362, 89, attained=0.6, speed="published"),
    Gpu("RTX PRO 6000", 97887, 1792, 500, 120),
    Gpu("A100 40GB", 40960, 1555, 312, 80, speed="published"),
    Gpu("A100 80GB", 81920, 1935, 312, 80, speed="published"),
    Gpu("H100 SXM", 81559, 3352, 989, 90, attained=HOPPER, speed="measured"),
    Gpu("H100 PCIe", 81559, 2039, 756, 90, attained=HOPPER),
    Gpu("H100 NVL", 95830, 3938, 835, 90, attained=HOPPER),
    Gpu("H200", 143771, 4800, 989, 90, attained=HOPPER, speed="measured"),
    Gpu("B200", 183359, 8000, 2250, 100, attained=HOPPER),
)
SIZE_WORDS = {"16gb", "32gb", "40gb", "80gb", "sxm"}  # not part of the name that PyTorch gives
ALIASES = {
    "a100": "A100 80GB",
    "h100": "H100 SXM",
    "v100": "V100 16GB",
    "a6000": "RTX A6000",
    "6000 ada": "RTX 6000 Ada",
    "4060 ti": "RTX 4060 Ti 16GB",
    "pro 6000": "RTX PRO 6000",
}


def find_gpu(name: str) -> Gpu:
    """A GPU by name, alias or memory (`24GB`); raises UsageError that names near ones."""
    rows = {_plain(gpu.name): gpu for gpu in GPUS}
    rows |= {_plain(alias): rows[_plain(full)] for alias, full in ALIASES.items()}
    wanted = _plain(name).removeprefix("nvidia")
    for known in (wanted, "rtx" + wanted):
        if known in rows:
            return rows[known]
    size = re.fullmatch(r"(\d{1,3}(?:\.\d+)?) ?(gb|gib)?", name.lower().strip())
    if size and float(size[1]) > 0:
        return unknown_gpu(float(size[1]))
    from difflib import get_close_matches

    near = [rows[key].name for key in get_close_matches(wanted, rows, n=3)]
    hint = (
        f"Did you mean {', '.join(dict.fromkeys(near))}?" if near else "Write its memory: `24GB`."
    )
    raise UsageError(f"gpu: {name!r} is not in the table", hint)


def unknown_gpu(memory_gib: float) -> Gpu:
    """A card of which only the memory is known: no time and no cost can be told."""
    return Gpu(f"GPU with {memory_gib:g} GiB", round(memory_gib * 1024), 0.0, 0.0, 89)


def device_gpu(name: str, memory_gib: float) -> Gpu:
    """The row of the card that PyTorch names, with the memory that is really there."""
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    rows = [(gpu, set(gpu.name.lower().split()) - SIZE_WORDS) for gpu in GPUS]
    fitting = [(gpu, own) for gpu, own in rows if own <= words]
    if not fitting:
        return unknown_gpu(memory_gib)
    best, _ = min(fitting, key=lambda x: (-len(x[1]), abs(x[0].memory - memory_gib * GIB)))
    return replace(best, memory_mib=round(memory_gib * 1024))


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9.]", "", name.lower())
