"""What an estimate is made from: plain data, without a recipe."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from peftcli.architecture.config import Architecture, Linear
from peftcli.estimate.step_model import TRL_LORA, StepModel

Mode = Literal["none", "full", "offload"] | int
"""What a recipe calls the ways of checkpointing; a number is of layers, from the lowest on."""
Attention = Literal["flash", "efficient", "masked", "eager"]
"""flash: no mask is built; masked: SDPA with a mask; eager: the score matrix in full."""


def mode_of(checkpointing: bool, offload: bool, lowest: int | None) -> Mode:
    """What the recipe calls it: whether a layer is checkpointed, how, and how many if not all."""
    if offload:
        return "offload"
    if lowest is not None:
        return lowest
    return "full" if checkpointing else "none"


@dataclass(frozen=True)
class Plan:
    """One way to run a tuning: the base, what is trained, and how much at a time."""

    architecture: Architecture
    trainable: int
    targets: tuple[Linear, ...] = ()
    """Linear modules with a low-rank update; empty for other methods."""
    rank: int = 0
    ranks: tuple[tuple[str, int], ...] = ()
    """Names of targets that have another rank, and that."""
    bottleneck: int = 0
    """Width of bottleneck adapters; 0 without them."""
    sites: int = 0
    """Bottleneck adapters in each layer."""
    layers: tuple[int, ...] | None = None
    """Layers with bottleneck adapters; None for all of them."""
    trains_base: bool = False
    trains_head: bool = False
    trains_embeddings: bool = False
    dropout: bool = False
    magnitudes: bool = False
    """DoRA: the length of each row of a weight is trained too."""
    adapter_bytes: int = 4
    """Bytes of one trained value and of its gradient."""
    base_bytes: int = 2
    """Bytes of a base weight that is not quantised."""
    quantization: Literal["nf4", "fp4", "fp8"] | None = None
    double_quantization: bool = True
    optimizer: str = "adamw_torch_fused"
    flat: bool = False
    """Small parameters are one tensor for the optimizer (peftcli/train/flat.py)."""
    batch: int = 16
    """Rows in an optimizer step."""
    micro_batch: int = 1
    length: int = 2048
    """Tokens of a row as it is computed: the longest row, or the packed length."""
    checkpointing: bool = False
    offload: bool = False
    """Checkpointed layers' inputs wait in host memory (peftcli/train/fast/offload.py)."""
    lowest: int | None = None
    """How many layers are checkpointed, from the lowest on; None for all, where any is."""
    attention: Attention = "flash"
    padded: bool = False
    """Rows of a micro-batch are padded to the longest, which SDPA needs a mask for."""
    loss: Literal["chunked", "logits"] = "chunked"
    """`chunked` never holds all logits; `logits` holds them, as a plain forward pass does."""
    step: StepModel = TRL_LORA

    def __hash__(self) -> int:
        """From what tells plans of one run apart; all the layers of a model take longer."""
        return hash((self.trainable, self.micro_batch, self.length, self.again, self.batch))

    def rank_of(self, target: Linear) -> int:
        """Width of this target's update."""
        return dict(self.ranks).get(target.name, self.rank)

    @property
    def mode(self) -> Mode:
        """What is kept of each layer, in the recipe's words."""
        return mode_of(self.checkpointing, self.offload, self.lowest)

    def checkpointed(self, mode: Mode) -> Plan:
        """The plan in that mode; layers that are not fused know none and full only."""
        fused = self.step.in_groups
        some = fused and isinstance(mode, int) and mode < self.architecture.layers
        return replace(
            self,
            checkpointing=mode != "none",
            offload=fused and mode == "offload",
            lowest=mode if some and isinstance(mode, int) else None,
        )

    @property
    def again(self) -> int:
        """Layers that are computed again to go backward."""
        if not self.checkpointing:
            return 0
        return self.architecture.layers if self.lowest is None else self.lowest

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch."""
        return self.micro_batch * self.length

    @property
    def kernel(self) -> Attention:
        """The attention of this micro-batch."""
        holds_no_scores = self.attention in ("flash", "efficient")
        if holds_no_scores and self.padded and self.micro_batch > 1:
            return "masked"
        return self.attention

    @property
    def accumulation(self) -> int:
        return max(1, self.batch // self.micro_batch)
