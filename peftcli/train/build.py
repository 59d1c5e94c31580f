"""The model with its untrained adapter, and the trainer around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from peft import PeftModel, initialize_lora_eva_weights
from torch.utils.data import DataLoader
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)

from peftcli.adapters import wrap
from peftcli.models import DTYPES, Device, load_base
from peftcli.recipe.schema import Model, Recipe
from peftcli.run_dir import RunDir
from peftcli.train import attention
from peftcli.train.batches import Batches, padded
from peftcli.train.config import sft_config
from peftcli.train.health import Health
from peftcli.train.interruption import Interruption
from peftcli.train.kernels import cannot_checkpoint, fast_model
from peftcli.train.monitor import Monitor
from peftcli.train.patience import Patience
from peftcli.train.setting import Setting
from peftcli.train.trainer import RecipeTrainer

LoadBase = Callable[[Model, Device, BitsAndBytesConfig | None, str | None], PreTrainedModel]
"""What `load_base` does; measuring memory needs no real weights and brings its own."""


def load_model(
    recipe: Recipe, setting: Setting, load: LoadBase = load_base
) -> PreTrainedModel | PeftModel:
    """The base on its device, with the recipe's untrained adapter around it."""
    set_seed(recipe.seed)
    limit = recipe.training.memory_limit_gib
    if limit is not None and setting.device.memory_gib is not None:
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / setting.device.memory_gib))
    method = recipe.method
    weights = replace(setting.device, dtype=method.weights_dtype(setting.device.dtype))
    attention.register()
    base = load(
        recipe.model,
        weights,
        method.quantization_config(setting.device.dtype),
        attention.NAME if setting.varlen else None,
    )
    config = method.peft_config(setting.architecture)
    if config is None:
        return base
    model = wrap(base, config)
    if method.initializes_from_data:
        rows = setting.train.select(range(min(64, len(setting.train))))
        pad = setting.tokenizer.pad_token_id
        loader = DataLoader(rows, batch_size=4, collate_fn=lambda part: padded(part, pad))
        initialize_lora_eva_weights(model, loader, show_progress_bar=False)
    return model


def build_trainer(
    recipe: Recipe,
    setting: Setting,
    folder: RunDir,
    model: PreTrainedModel | PeftModel,
    monitor: Monitor,
    interruption: Interruption,
    health: Health,
) -> RecipeTrainer:
    """The trainer of this run; trained parameters are float32 whatever the base is."""
    callbacks: list[TrainerCallback] = [monitor, interruption]
    patience = recipe.evaluation.early_stopping
    if patience is not None:
        threshold = recipe.evaluation.early_stopping_threshold
        callbacks.append(Patience(patience, threshold))
    batches, eval_batches = _batches(recipe, setting)
    plan = setting.plan
    fast, kernels = None, "plain layers"
    if setting.varlen and recipe.training.kernels == "auto":
        fast, kernels = fast_model(
            model,
            plan.checkpointing,
            offload=plan.offload,
            lowest=plan.lowest,
            fp8=recipe.method.frozen_in_fp8,
            dtype=DTYPES[setting.device.dtype],
        )
    elif plan.offload or plan.lowest is not None:
        raise cannot_checkpoint(plan.lowest, "and this recipe keeps them away")
    if fast is not None:  # fused layers recompute themselves; twice would be once too often
        plan = replace(plan, checkpointing=False)
    trainer = RecipeTrainer(
        model=model,
        args=sft_config(recipe, plan, setting.device, folder),
        train_dataset=setting.train.with_format("numpy"),
        eval_dataset=None if setting.eval is None else setting.eval.with_format("numpy"),
        tokenizer=setting.tokenizer,
        callbacks=callbacks,
        learning_rate_multipliers=recipe.method.learning_rate_multipliers(),
        keep_checkpoints=recipe.training.keep_checkpoints,
        check_interruption=interruption.check,
        batches=batches,
        health=health,
        eval_batches=eval_batches,
        clock=monitor.clock,
    )
    trainer.remove_callback(PrinterCallback)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL rounds adapters on a 4-bit base to bfloat16
            parameter.data = parameter.data.float()
    trainer.fast, trainer.kernels = fast, kernels
    return trainer


def _batches(recipe: Recipe, setting: Setting) -> tuple[Batches, Batches]:
    """How rows are put together in training, and in evaluation."""
    batches = Batches(
        setting.tokenizer.pad_token_id,
        micro_batch_size=setting.plan.micro_batch_size,
        longest=setting.longest,
        apart=setting.varlen or setting.plan.packing,
    )
    one_at_a_time = setting.plan.packing and not setting.varlen
    if one_at_a_time or recipe.evaluation.batch_size is None:
        return batches, batches
    return batches, replace(batches, micro_batch_size=recipe.evaluation.batch_size)


def count_trained(model: torch.nn.Module) -> int:
    """How many values the optimizer will change."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
