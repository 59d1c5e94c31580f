"""What an estimate says: plain numbers, made for `dataclasses.asdict` and JSON."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rows:
    """What is known of the training rows, in tokens; None where the data was not read."""

    count: int | None = None
    longest: int | None = None
    mean: float | None = None


@dataclass(frozen=True)
class MemoryPart:
    """One part of the peak."""

    name: str
    gib: float
    formula: str


@dataclass(frozen=True)
class MemoryEstimate:
    """The peak of GPU memory; low, likely and high are what PyTorch allocates."""

    low_gib: float
    likely_gib: float
    high_gib: float
    needed_gib: float
    """High, plus fragments of the allocator and the CUDA context: what to have free."""
    available_gib: float
    context_gib: float
    loading_gib: float
    paged_gib: float
    """Optimizer states that leave the GPU when it is full; not part of the peak."""
    moment: str
    parts: tuple[MemoryPart, ...]


@dataclass(frozen=True)
class Settings:
    """What `auto` comes to."""

    micro_batch_size: int
    accumulation: int
    checkpointing: str
    attention: str
    optimizer: str
    tokens_per_row: int


@dataclass(frozen=True)
class TimeEstimate:
    """The run from start to end; None in Estimate where rows or rates are not known."""

    steps: int
    low_seconds: float
    likely_seconds: float
    high_seconds: float
    step_seconds: float
    tokens_per_second: float
    low_cost_usd: float | None
    high_cost_usd: float | None


@dataclass(frozen=True)
class Advice:
    """A change of the recipe that saves memory."""

    line: str
    consequence: str
    saves_gib: float
    fits: bool


@dataclass(frozen=True)
class OtherGpu:
    """A GPU that the same settings fit."""

    name: str
    memory_gib: float
    low_price_usd: float | None
    high_price_usd: float | None


@dataclass(frozen=True)
class Estimate:
    """All that `peftcli estimate` says; numbers only, made for asdict and JSON."""

    model: str
    parameters: int
    trainable: int
    gpu: str
    verdict: str
    """fits, tight, or does not fit."""
    memory: MemoryEstimate
    settings: Settings
    time: TimeEstimate | None
    changes: tuple[Advice, ...]
    other_gpus: tuple[OtherGpu, ...]
    notes: tuple[str, ...]
