"""The `training` section."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict, field_validator, model_validator

from peftcli.methods.base import Conflict, Section
from peftcli.recipe.sections.share import Share

Optimizer = Literal[
    "adamw_torch_fused",
    "adamw_torch",
    "adamw_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "adafactor",
    "lion_32bit",
    "paged_lion_8bit",
    "sgd",
]
Schedule = Literal[
    "cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"
]
Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
Layers = Annotated[int, Strict(), Field(ge=1)]


class Training(Section):
    """How long, how fast, and how much at a time."""

    learning_rate: float | None = Field(None, gt=0, le=10)
    """The peak learning rate; lora and qlora 2e-4, adapter 1e-4, full 1e-5 when absent."""
    epochs: float = Field(3.0, gt=0, le=1_000_000)
    """Passes over the training rows."""
    max_steps: int | None = Field(None, ge=1, le=1_000_000_000)
    """Stop after this many optimizer steps, whatever `epochs` says."""
    batch_size: int = Field(16, ge=1, le=100_000)
    """The effective batch: rows per optimizer step."""
    micro_batch_size: int | Literal["auto"] = "auto"
    """Rows per forward pass; `auto` is the most that fits and divides batch_size."""
    optimizer: Optimizer | None = None
    """adamw_torch_fused, or paged_adamw_32bit on a 4-bit base, when absent."""
    schedule: Schedule = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup: Annotated[Share, Field(ge=0)] = 0.03
    """Warm-up as a share of all steps (`3%`), or a number of steps from 1 on."""
    weight_decay: float = Field(0.0, ge=0, lt=1)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of AdamW's first moment."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of AdamW's second moment."""
    adam_epsilon: float = Field(1e-8, gt=0)
    """Added to AdamW's denominator."""
    neftune_noise_alpha: float | None = Field(None, gt=0)
    """NEFTune: noise on the embeddings while training; 5 is usual (arXiv 2310.05914)."""
    checkpointing: Literal["auto", "none", "full", "offload"] | Layers = "auto"
    """Recompute activations in the backward pass: less memory, about a third slower; a number does
    it in so many of the layers, with `offload` the layers' inputs, which are all that is kept, wait
    in host memory too (both on fused layers only)."""
    kernels: Literal["auto", "plain"] = "auto"
    """`auto` runs layers and loss on fused functions where the model has them; `plain` never."""
    packing: Literal["auto"] | bool = "auto"
    """Several rows in one sequence, with attention kept apart; `auto` packs plain text."""
    save_steps: int | None = Field(None, ge=1)
    """Steps between checkpoints; as often as the evaluation when absent."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many checkpoints stay: the best and the newest ones."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """`cuda` refuses to run without a GPU."""
    memory_limit_gib: float | None = Field(None, gt=0)
    """Use at most this much of the GPU, where others work on it too; all when absent."""
    report_to: Annotated[tuple[Tracker, ...], Strict(False)] = ()
    """Experiment trackers that also receive the metrics."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """Whether a loss or gradient that is not finite, or exploded, stops the run or its step."""
    max_nonfinite_steps: int = Field(3, ge=1)
    """With `skip`, stop after this many steps in a row whose loss or gradient is not finite."""
    on_oom: Literal["stop", "shrink"] = "stop"
    """Out of memory: stop, or go on from the last step with half the rows at a time; one row goes
    on with every layer checkpointed where some were, and with `checkpointing: offload` where all
    were."""

    @property
    def asks_for_fused_layers(self) -> str | None:
        """What only fused layers do of the ways of checkpointing; None for the others."""
        if isinstance(self.checkpointing, int):
            return "a number of layers"
        return "offload" if self.checkpointing == "offload" else None

    @field_validator("micro_batch_size")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError(f"at least 1, found {value}; or write `auto`")
        return value

    @field_validator("warmup")
    @classmethod
    def _share_or_steps(cls, value: float) -> float:
        if value > 1 and value != int(value):
            raise ValueError(f"a share below 1 or a whole number of steps, found {value}")
        return value

    @model_validator(mode="after")
    def _divides(self) -> Training:
        micro = self.micro_batch_size
        if isinstance(micro, int) and self.batch_size % micro:
            text = (
                f"{micro} does not divide `batch_size` {self.batch_size}; batch_size is the "
                "effective batch, gradient accumulation follows from the two"
            )
            raise Conflict([(("micro_batch_size",), text)])
        return self
