"""What the command line asks of a merge."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from peftcli.errors import UsageError

SaveDtype = Literal["float32", "bfloat16", "float16"]
BaseKind = Literal["dequantized", "original"]
Combine = Literal["linear", "ties", "dare_linear", "dare_ties"]
Device = Literal["cpu", "cuda"]
Export = Literal["ollama", "vllm-lora"]
DENSITY = 0.5


@dataclass(frozen=True)
class WeightedAdapter:
    """One of several adapters, and the factor on its update."""

    path: Path
    weight: float = 1.0


@dataclass(frozen=True)
class MergeOptions:
    """Everything but the source; the defaults are those of the command line."""

    output: Path | None = None
    """The folder to write; `merged` in a run folder, beside a lone adapter, when absent."""
    fp32: bool = True
    """Whether the arithmetic is in float32 or in the base's own dtype."""
    save_dtype: SaveDtype | None = None
    """The dtype of the written weights; that of each tensor of the base when absent."""
    base: BaseKind | None = None
    """Which base the update is added to; the one it was trained on when absent."""
    base_model: str | None = None
    """The base's folder or hub id, where the run or the adapter does not say it rightly."""
    adapters: tuple[WeightedAdapter, ...] = ()
    """Further adapters on the same base."""
    combine: Combine = "linear"
    """How several updates become one."""
    density: float | None = None
    """The share of each update that TIES and DARE keep; DENSITY when absent."""
    device: Device = "cpu"
    verify: bool | None = None
    """Compare with base + adapter before publishing; where memory allows when absent."""
    allow_pickle: bool = False
    """Read `.bin` weights, with PyTorch's restricted unpickler."""
    export: Export | None = None
    overwrite: bool = False
    offline: bool = False


def check_combination(combine: Combine, density: float | None, count: int) -> None:
    """Raise UsageError for a way of joining that `count` adapters cannot have, or no effect."""
    if combine == "linear" and density is not None:
        raise UsageError(
            "--density: is for TIES and DARE, and a linear merge keeps all of each update",
            "leave it away, or choose --combine ties, dare_linear or dare_ties",
        )
    if combine != "linear" and count == 1:
        raise UsageError(
            f"--combine {combine}: joins several adapters, and one is named; it would only lose "
            "a part of its update",
            "leave it away, or name further adapters: --adapter PATH:WEIGHT",
        )
    if density is not None and not 0 < density <= 1:
        raise UsageError(
            f"--density {density:g}: is a share of each update",
            "write a number above 0, at most 1",
        )


def parse_adapter(text: str) -> WeightedAdapter:
    """`PATH:WEIGHT` or `PATH`; raises UsageError for a weight that is no finite number."""
    path, colon, weight = text.rpartition(":")
    if not colon or "/" in weight:
        return WeightedAdapter(Path(text))
    try:
        value = float(weight)
    except ValueError:
        value = float("nan")
    if value != value or abs(value) == float("inf"):
        raise UsageError(f"--adapter {text}: `{weight}` is no number", "write PATH:0.5")
    return WeightedAdapter(Path(path), value)
