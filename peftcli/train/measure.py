"""The largest step of a recipe, run a few times on this GPU, and what was counted there."""

from __future__ import annotations

import gc
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from peftcli.architecture.shapes import Architecture
from peftcli.data.report import DataReport, SplitReport
from peftcli.dataset import Prepared
from peftcli.estimate.result import Rows
from peftcli.models import Device, load_base
from peftcli.recipe.checks import rows_apart
from peftcli.recipe.schema import Recipe
from peftcli.run_dir import RunDir
from peftcli.train.attempt import health_of
from peftcli.train.build import LoadBase, build_trainer, load_model
from peftcli.train.fast.weights import forget_room
from peftcli.train.flat import forget_settings
from peftcli.train.interruption import Interruption
from peftcli.train.monitor import Monitor
from peftcli.train.plan import Load, decide
from peftcli.train.precision import check_precision
from peftcli.train.setting import Setting, pack

GIB = 2**30
PACKED_ROWS = 4  # rows that share a sequence, where rows are packed


@dataclass(frozen=True)
class Shape:
    """How much goes through the model at a time."""

    tokens_per_row: int
    micro_batch_size: int
    checkpointing: bool
    packing: bool


@dataclass(frozen=True)
class Measured:
    """Peaks and sizes in GiB, None where there is no GPU; seconds of a step after the first."""

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
    """Times each step, and keeps the trainer from saving or evaluating."""

    device: Device
    seconds: list[float] = field(default_factory=list)
    loss: float = 0.0
    began: float = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        _synchronize(self.device)
        if not self.seconds:
            reset_peaks(self.device)
        self.began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        _synchronize(self.device)
        self.seconds.append(time.perf_counter() - self.began)
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
    check_precision(recipe.method, device)
    release(device)
    others = allocated(device) or 0.0  # held by this process for other reasons

    def own(size: float | None) -> float | None:
        return None if size is None else size - others

    setting = _setting(recipe, architecture, device, tokenizer, shape, steps)
    loading: list[float | None] = []

    def counted(*arguments: Any) -> Any:
        reset_peaks(device)
        base = load(*arguments)
        gc.collect()
        loading.extend((own(peak(device)), own(allocated(device))))
        return base

    model = load_model(setting.recipe, setting.setting, counted)
    counter = _Counter(device)
    with tempfile.TemporaryDirectory() as name:
        folder = RunDir(Path(name))
        interruption = Interruption(lambda event: None)
        health = health_of(setting.recipe, device)
        monitor = Monitor(folder.metrics, lambda event: None, 1.0, health)
        trainer = build_trainer(
            setting.recipe, setting.setting, folder, model, monitor, interruption, health
        )
        trainer.add_callback(counter)  # after the monitor, which asks for a checkpoint at the end
        del model
        gc.collect()
        before = own(allocated(device))
        if recipe.method.frozen_in_fp8 and before is not None:
            loading = [
                own(peak(device)),
                _frozen_gib(trainer.model),
            ]  # it was turned into fp8 just now
        try:
            trainer.train()
        finally:
            monitor.close()
        states, paged = _state_bytes(trainer.optimizer)
    cuda = device.kind == "cuda"
    load_peak, base = loading
    return Measured(
        device=device.name,
        steps=len(counter.seconds),
        step_seconds=statistics.median(counter.seconds[1:] or counter.seconds),
        loss=counter.loss,
        loading_gib=load_peak,
        base_gib=base,
        adapter_gib=before - base if before is not None and base is not None else None,
        states_gib=states / GIB if cuda else None,
        paged_gib=paged / GIB if cuda else None,
        peak_gib=own(peak(device)),
        reserved_gib=torch.cuda.max_memory_reserved() / GIB if cuda else None,
        card_gib=card_memory() if cuda else None,
    )


@dataclass(frozen=True)
class _Run:
    recipe: Recipe
    setting: Setting


def _setting(
    recipe: Recipe,
    architecture: Architecture,
    device: Device,
    tokenizer: PreTrainedTokenizerBase,
    shape: Shape,
    steps: int,
) -> _Run:
    """What `settle` makes of a recipe's rows, for rows of random tokens."""
    training = recipe.training.model_copy(
        update={"max_steps": steps, "save_steps": None, "report_to": ()}
    )
    data = recipe.data.model_copy(update={"eval": None})
    recipe = recipe.model_copy(update={"training": training, "data": data})
    apart = rows_apart(recipe, architecture)
    count = training.batch_size * steps
    rows = _rows(shape, architecture.vocab_size, count, even=apart)
    load = Load(shape.micro_batch_size, shape.checkpointing, ())
    plan = decide(recipe, rows=len(rows), has_eval=False, packing=shape.packing, load=load)
    setting = Setting(
        architecture=architecture,
        device=device,
        tokenizer=tokenizer,
        prepared=Prepared(rows, None, _report(rows, architecture.vocab_size)),
        train=rows,
        eval=None,
        plan=plan,
        estimate=None,
        trainable=recipe.method.trainable_parameters(architecture),
        varlen=apart,
        max_length=shape.tokens_per_row,
        longest=shape.tokens_per_row,
        seen=recipe,
        rows=Rows(len(rows), shape.tokens_per_row, float(shape.tokens_per_row)),
    )
    return _Run(recipe, setting)


def _rows(shape: Shape, vocabulary: int, count: int, *, even: bool) -> Dataset:
    """Rows of random tokens.

    Where they would be padded, one of each micro-batch has the full length and the others a token
    less: real rows are never equal, and padding changes the kernel.
    """
    length, generator = shape.tokens_per_row, torch.Generator().manual_seed(0)
    shorter = [not even and i % shape.micro_batch_size > 0 for i in range(count)]
    lengths = [length - less for less in shorter]
    if shape.packing:
        lengths = [length // PACKED_ROWS] * (PACKED_ROWS * count)
    rows = []
    for size in lengths:
        tokens = torch.randint(0, vocabulary, (size,), generator=generator).tolist()
        rows.append({"input_ids": tokens, "labels": tokens})
    made = Dataset.from_list(rows)
    return pack(made, length) if shape.packing else made


def _report(rows: Dataset, vocabulary: int) -> DataReport:
    lengths = [len(row) for row in rows["input_ids"]]
    longest = max(lengths)
    split = SplitReport(
        read=len(lengths),
        bad=0,
        too_long=0,
        truncated=0,
        answer_cut=0,
        untrained=0,
        duplicates=0,
        overlap=0,
        kept=len(lengths),
        tokens=sum(lengths),
        trained_tokens=sum(lengths),
        length_p50=longest,
        length_p90=longest,
        length_p99=longest,
        length_max=longest,
    )
    return DataReport(split, None, (), "none", (), vocabulary - 1)


def _frozen_gib(model: torch.nn.Module) -> float:
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return sum(p.numel() * p.element_size() for p in frozen) / GIB


def _state_bytes(optimizer: Any) -> tuple[int, int]:
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


def release(device: Device) -> None:
    """Give back what an earlier measurement in this process left."""
    forget_settings()
    forget_room()
    gc.collect()
    if device.kind == "cuda":
        torch.cuda.synchronize()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


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


def card_memory() -> float | None:
    """What nvidia-smi says is used of the first card, in GiB; None where it is not installed."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    first = done.stdout.split()
    return int(first[0]) / 1024 if first and first[0].isdigit() else None


def _synchronize(device: Device) -> None:
    if device.kind == "cuda":
        torch.cuda.synchronize()
