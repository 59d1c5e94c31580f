"""What a merge did, as data for the terminal, for `--json` and for merge.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Precision:
    """What rounding to the saved dtype cost the update."""

    touched: int
    """Weights with an update other than zero; of large tensors an eighth was looked at."""
    unchanged: int
    """Those of them whose stored value is the base's all the same."""
    relative_error: float
    """Norm of (stored - exact) over the norm of the update, over all touched tensors."""

    @property
    def lost_share(self) -> float:
        """The share of touched weights that did not change at all."""
        return self.unchanged / self.touched if self.touched else 0.0


@dataclass(frozen=True)
class Distance:
    """How far two models' logits are from each other on the same tokens."""

    maximum: float
    mean: float
    top1_agreement: float
    """Share of positions where both prefer the same token."""
    kl: float
    """Mean Kullback-Leibler divergence from the first to the second, in nats."""


@dataclass(frozen=True)
class Verification:
    """Merged, reloaded from disk, versus base + adapter, both computed in float32."""

    prompts: int
    tokens: int
    prompts_from: str
    logit_std: float
    merged: Distance
    noise: Distance | None
    """Base + adapter in the saved dtype versus itself in float32; None for float32."""
    noise_dtype: str | None
    bound: float
    """The largest accepted `merged.maximum`."""
    base_gap: Distance | None
    """After a 4-bit or fp8 run: the model as trained versus its adapter on the original base."""


@dataclass(frozen=True)
class Proof:
    """The written weights, read again and compared with the base's bytes."""

    kept: int
    """Tensors without an update: the base's bytes, or its values rounded to the saved dtype."""
    changed: int
    """Tensors with an update that differ from the base's."""
    unchanged_updates: tuple[str, ...]
    """Tensors whose whole update was lost to rounding."""


@dataclass(frozen=True)
class BaseUsed:
    """The base, and why this form of it."""

    name: str
    folder: Path
    commit: str | None
    kind: str
    """dequantized or original."""
    why: str
    quantization: str | None
    """nf4, fp4 or fp8, where the run was trained on such a base."""
    tensors_dequantized: int


@dataclass(frozen=True)
class MergeResult:
    """A finished merge."""

    output: Path
    base: BaseUsed
    adapters: tuple[tuple[str, float], ...]
    method: str
    combine: str | None
    """How several adapters were joined; None for one."""
    density: float | None
    """The share of each update that TIES and DARE kept."""
    arithmetic: str
    dtypes: dict[str, int]
    """Saved dtype -> number of tensors."""
    tensors: int
    tensors_changed: int
    tensors_added: tuple[str, ...]
    untied: bool
    """Whether embedding and output head were tied in the base and are not any more."""
    vocabulary: tuple[int, int] | None
    """Rows of the embedding before and after, where they differ."""
    bytes: int
    seconds: float
    peak_memory_gib: float
    precision: Precision
    proof: Proof | None
    verification: Verification | None
    not_verified: str | None
    """Why the logits were not compared; None when they were."""
    exported: tuple[str, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = asdict(self)
        values["precision"]["lost_share"] = self.precision.lost_share
        values["output"] = str(self.output)
        values["base"]["folder"] = str(self.base.folder)
        return values


def size(count: int) -> str:
    """Bytes as a person says them: 4.03 MB, 16.1 GB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count} bytes"
