"""The largest step of a recipe, run a few times on this GPU, and what was counted there."""

from __future__ import annotations

import gc
import statistics
import tempfile
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from peftcli.architecture.shapes import Architecture
from peftcli.models import Device, load_base
from peftcli.recipe.schema import Recipe
from peftcli.run_dir import RunDir
from peftcli.train import backward
from peftcli.train.attempt import health_of
from peftcli.train.build import LoadBase, build_trainer, load_model
from peftcli.train.clock import Mark, mark, seconds_between
from peftcli.train.fast.four_bit import forget_room
from peftcli.train.fast.fp8 import forget_turned
from peftcli.train.fast.host import forget_pinned
from peftcli.train.flat import forget_settings
from peftcli.train.interruption import Interruption
from peftcli.train.memory import (
    GIB,
    OwnMemory,
    allocated,
    card_memory,
    frozen_gib,
    reset_peaks,
    state_bytes,
    synchronize,
)
from peftcli.train.monitor import Monitor
from peftcli.train.precision import check_precision
from peftcli.train.random_rows import Shape, random_setting
from peftcli.train.setting import Setting
from peftcli.train.trainer import RecipeTrainer


@dataclass(frozen=True)
class Measured:
    """Peaks and sizes in GiB, None where there is no GPU; the median step after the first."""

    device: str
    steps: int
    step_seconds: float
    loss: float
    loading_gib: float | None
    """The peak while the base was loaded."""
    base_gib: float | None
    """The base after loading."""
    adapter_gib: float | None
    """Trained values, and what wrapping the base added to them."""
    states_gib: float | None
    """Optimizer states that PyTorch allocated."""
    paged_gib: float | None
    """Optimizer states in managed memory, which PyTorch does not count."""
    peak_gib: float | None
    """The peak that PyTorch allocated in a step."""
    reserved_gib: float | None
    """The peak that PyTorch held of the card, with the gaps between its blocks."""
    card_gib: float | None
    """What nvidia-smi shows after the steps, whoever uses it."""


@dataclass
class _Counter(TrainerCallback):  # type: ignore[misc]
    """Times the steps, and keeps the trainer from saving or evaluating.

    It waits for the GPU before the first step and after the last only: in between the host goes
    ahead, as it does in a run.
    """

    device: Device
    last: int
    loss: float = 0.0
    _marks: list[Mark] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """How many were made."""
        return max(0, len(self._marks) - 1)

    @property
    def seconds(self) -> float:
        """The median of the steps after the first; the first, if there is no other."""
        each = [seconds_between(one, other) for one, other in pairwise(self._marks)]
        return statistics.median(each[1:] or each or [0.0])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if not self._marks:
            synchronize(self.device)
            reset_peaks(self.device)
            self._marks.append(mark(args.device))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._marks.append(mark(args.device))
        if self.steps == self.last:
            synchronize(self.device)
        control.should_save = control.should_evaluate = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        self.loss = (logs or {}).get("loss", self.loss)


def measure(
    recipe: Recipe,
    architecture: Architecture,
    device: Device,
    tokenizer: PreTrainedTokenizerBase,
    shape: Shape,
    *,
    steps: int = 2,
    load: LoadBase = load_base,
) -> Measured:
    """Train `steps` steps of rows of random tokens, all of the full length, as `train` would.

    Raises torch.OutOfMemoryError where the card is too small. On a CPU only time is measured.
    """
    check_precision(recipe, device)
    release(device)
    memory = OwnMemory(device, allocated(device) or 0.0)
    setting = random_setting(recipe, architecture, device, tokenizer, shape, steps)
    loading: list[float | None] = []

    def counted(*arguments: Any) -> Any:
        reset_peaks(device)
        base = load(*arguments)
        gc.collect()
        loading.extend((memory.peak(), memory.allocated()))
        return base

    model = load_model(setting.seen, setting, counted)
    with tempfile.TemporaryDirectory() as name:
        trainer, monitor = _trainer(setting, model, RunDir(Path(name)))
        counter = _Counter(device, steps)
        trainer.add_callback(counter)  # after the monitor, which asks for a checkpoint at the end
        del model
        gc.collect()
        before = memory.allocated()
        if recipe.method.frozen_in_fp8 and before is not None:
            loading = [memory.peak(), frozen_gib(trainer.model)]  # it was turned into fp8 just now
        try:
            trainer.train()
        finally:
            monitor.close()
    return _measured(counter, memory, loading, before, state_bytes(trainer.optimizer))


def _trainer(
    setting: Setting, model: PreTrainedModel | PeftModel, folder: RunDir
) -> tuple[RecipeTrainer, Monitor]:
    """The trainer that `train` would have, and its monitor; nobody hears what they tell."""
    health = health_of(setting.seen, setting.device)
    monitor = Monitor(folder.metrics, lambda event: None, float, health)
    interruption = Interruption(lambda event: None)
    trainer = build_trainer(setting.seen, setting, folder, model, monitor, interruption, health)
    return trainer, monitor


def _measured(
    counter: _Counter,
    memory: OwnMemory,
    loading: list[float | None],
    before: float | None,
    states: tuple[int, int],
) -> Measured:
    """The result; `before` is what was allocated after wrapping the base, `states` bytes."""
    cuda = counter.device.kind == "cuda"
    load_peak, base = loading
    plain, paged = states
    return Measured(
        device=counter.device.name,
        steps=counter.steps,
        step_seconds=counter.seconds,
        loss=counter.loss,
        loading_gib=load_peak,
        base_gib=base,
        adapter_gib=before - base if before is not None and base is not None else None,
        states_gib=plain / GIB if cuda else None,
        paged_gib=paged / GIB if cuda else None,
        peak_gib=memory.peak(),
        reserved_gib=torch.cuda.max_memory_reserved() / GIB if cuda else None,
        card_gib=card_memory() if cuda else None,
    )


def release(device: Device) -> None:
    """Give back what an earlier measurement in this process left."""
    backward.forget_failed()
    forget_settings()
    forget_room()
    forget_turned()
    gc.collect()
    if device.kind == "cuda":
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        forget_pinned()
