"""What an estimate says: plain numbers, made for `dataclasses.asdict` and JSON.

Nobody compares them, and a class without `eq` starts faster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peftcli.estimate.plan import Mode


@dataclass(frozen=True, eq=False)
class Rows:
    """What is known of the training rows, in tokens; None where the data was not read."""

    count: int | None = None
    longest: int | None = None
    mean: float | None = None
    how: str = ""
    """How they were counted, where that was not by the tokenizer."""
    unread: str = ""
    """Why they were not read, where there is more to say than that."""


@dataclass(frozen=True, eq=False)
class MemoryPart:
    """One part of the peak."""

    name: str
    gib: float
    formula: str


@dataclass(frozen=True, eq=False)
class MemoryEstimate:
    """The peak of GPU memory; low, likely and high are what PyTorch allocates."""

    low_gib: float
    likely_gib: float
    high_gib: float
    step_gib: float
    """The likely peak of a training step, which is less than that of loading at times."""
    reserved_gib: float
    """What PyTorch holds of the card at the likely peak."""
    card_gib: float
    """What nvidia-smi shows then."""
    needed_gib: float
    """High, plus fragments of the allocator and the CUDA context: what to have free."""
    available_gib: float
    context_gib: float
    loading_gib: float
    """The peak before the first step."""
    base_gib: float
    adapter_gib: float
    states_gib: float
    paged_gib: float
    """Optimizer states that leave the GPU when it is full; not part of the peak."""
    host_gib: float
    """Host memory that the layers' inputs take, with `checkpointing: offload`."""
    moment: str
    parts: tuple[MemoryPart, ...]


@dataclass(frozen=True, eq=False)
class MergeEstimate:
    """What `merge` takes of the host; None in Estimate where a method cannot be merged."""

    host_gib: float
    """Memory while tensors are streamed."""
    verify_gib: float
    """Memory to compare the merged model with base + adapter, which is left out without it."""
    disk_gib: float


@dataclass(frozen=True, eq=False)
class Settings:
    """What `auto` comes to."""

    micro_batch_size: int
    accumulation: int
    checkpointing: Mode
    attention: str
    optimizer: str
    tokens_per_row: int
    packing: bool


@dataclass(frozen=True, eq=False)
class Limits:
    """The most that fits with the other settings as they are; a row has at most the positions of
    the model."""

    micro_batch_size: int
    tokens_per_row: int
    checkpointing: Mode
    host_gib: float
    """Host memory that this takes, with `checkpointing: offload`."""


@dataclass(frozen=True, eq=False)
class TimeEstimate:
    """A step, and the run from start to end where the number of steps is known."""

    step_seconds: float
    low_step_seconds: float
    high_step_seconds: float
    tokens_per_second: float
    speed: str
    """Where the card's efficiency comes from: measured, published, or its data sheet."""
    low_usd_per_million_tokens: float | None = None
    high_usd_per_million_tokens: float | None = None
    steps: int | None = None
    low_seconds: float | None = None
    likely_seconds: float | None = None
    high_seconds: float | None = None
    low_cost_usd: float | None = None
    high_cost_usd: float | None = None


@dataclass(frozen=True, eq=False)
class Suggestion:
    """A change of the recipe that saves memory."""

    line: str
    consequence: str
    saves_gib: float
    fits: bool


@dataclass(frozen=True, eq=False)
class OtherGpu:
    """A GPU that the same settings fit."""

    name: str
    memory_gib: float
    low_price_usd: float | None
    high_price_usd: float | None


@dataclass(frozen=True, eq=False)
class Estimate:
    """All that `peftcli estimate` says; numbers only, made for asdict and JSON."""

    model: str
    method: str
    parameters: int
    trainable: int
    adapter_file_gib: float
    """What the run saves as its result."""
    gpu: str
    verdict: str
    """fits, tight, fits with changes, does not fit, or does not run: `refusal` says why."""
    memory: MemoryEstimate
    settings: Settings
    limits: Limits | None
    merge: MergeEstimate | None
    time: TimeEstimate | None
    """None for a card whose rates are not known."""
    changes: tuple[Suggestion, ...]
    paste: str
    """Lines of YAML that make the run fit together; empty where it fits, or nothing helps."""
    other_gpus: tuple[OtherGpu, ...]
    refusal: str
    """Why `train` refuses the recipe on this card, whatever it holds; empty where it does not."""
    own_price: bool
    """Whether the cost follows from --price and not from our table."""
    offload_needs_gib: float
    """Host memory with which it would fit, where this machine has less; 0 elsewhere."""
    notes: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether the run can be tried as it is."""
        return self.verdict in ("fits", "tight")
