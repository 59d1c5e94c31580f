"""One go at the steps of a run; it ends, is interrupted, fails, or runs out of memory."""

from __future__ import annotations

import gc
import math
import traceback
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from peftcli.events import Listener, Note
from peftcli.models import Device
from peftcli.recipe.schema import Recipe
from peftcli.run_dir import RunDir
from peftcli.train import backward, checkpoints, rng
from peftcli.train.build import build_trainer
from peftcli.train.health import Health
from peftcli.train.interruption import Interruption
from peftcli.train.monitor import Monitor
from peftcli.train.setting import Setting
from peftcli.train.starting import Starting
from peftcli.train.trainer import RecipeTrainer

# PyTorch has an error of its own for the GPU; for the CPU, cuBLAS and the driver only a text.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass(frozen=True)
class Ended:
    """The steps are done, or the recipe or the numbers stopped them."""

    trainer: RecipeTrainer
    monitor: Monitor


@dataclass(frozen=True)
class RanOut:
    """A step did not fit; `checkpoint` is where the run can go on, None at the start."""

    step: int
    checkpoint: Path | None
    fused: bool
    """Whether it ran on the fused layers."""


def attempt(
    recipe: Recipe,
    setting: Setting,
    folder: RunDir,
    model: PreTrainedModel | PeftModel | None,
    checkpoint: Path | None,
    interruption: Interruption,
    tell: Listener,
    *,
    probe: bool,
) -> Ended | RanOut:
    """Train from `checkpoint` on; KeyboardInterrupt after a signal, once everything is saved."""
    health = health_of(recipe, setting.device)
    monitor = Monitor(folder.metrics, tell, partial(tokens_read, setting), health)
    starting = Starting(checkpoint, tell, probe=probe)
    trainer = build_trainer(recipe, setting, folder, model, monitor, interruption, health)
    tell(Note(trainer.kernels))
    trainer.add_callback(starting)
    starting.trainer = trainer
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return Ended(trainer, monitor)
    except KeyboardInterrupt:
        _save_unevaluated(trainer, interruption)
        raise
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the activations
        backward.forget_failed()
        trainer._log_finished(leave=0)
        if health.failure is not None:  # of the step before, which was not looked at yet
            return Ended(trainer, monitor)
    finally:
        monitor.close()
    rescued = _rescued(trainer, folder, checkpoint, starting.whole)
    return RanOut(trainer.state.global_step, rescued, trainer.fast is not None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was short, on a GPU or on the machine."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return any(mark in str(error) for mark in OUT_OF_MEMORY)


def tokens_read(setting: Setting, steps: int) -> float:
    """How many tokens the first so many optimizer steps read, for rows of mean length.

    The last step of an epoch takes the rows that are left.
    """
    rows, batch = len(setting.train), setting.plan.micro_batch_size * setting.plan.accumulation
    epochs, more = divmod(steps, math.ceil(rows / batch))
    return setting.prepared.report.train.tokens / rows * (epochs * rows + more * batch)


def free_memory() -> None:
    """Give back what a trainer that is gone held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _rescued(
    trainer: RecipeTrainer, folder: RunDir, began: Path | None, whole: bool
) -> Path | None:
    """A checkpoint of the last whole step, written now if the parameters are still its own."""
    step = trainer.state.global_step
    if step == 0:
        return began
    target = folder.checkpoints / f"checkpoint-{step}"
    if target.exists() and checkpoints.verify(target) is None:
        return target
    if not whole or trainer.control.should_evaluate:
        saved = [n for n in checkpoints.steps(folder.checkpoints) if n <= step]
        return folder.checkpoints / f"checkpoint-{max(saved)}" if saved else None
    trainer.model.zero_grad(set_to_none=True)
    free_memory()
    trainer._save_checkpoint(trainer.model, None)
    return target


def _save_unevaluated(trainer: RecipeTrainer, interruption: Interruption) -> None:
    """A signal cut an evaluation short: save the step, and note that it was not looked at."""
    if interruption.before_evaluation is None or not trainer.control.should_evaluate:
        return
    rng.restore(interruption.before_evaluation)
    trainer.unevaluated = True
    trainer._save_checkpoint(trainer.model, None)


def health_of(recipe: Recipe, device: Device) -> Health:
    """What judges the numbers of a run, as the recipe says."""
    training = recipe.training
    return Health(
        on_nonfinite=training.on_nonfinite,
        max_nonfinite=training.max_nonfinite_steps,
        max_norm=training.max_grad_norm,
        scaled=device.kind == "cuda" and device.dtype == "float16",
    )
