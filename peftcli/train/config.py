"""The recipe in TRL's own words: one SFTConfig, every keyword written out."""

from __future__ import annotations

import os

from trl import SFTConfig

from peftcli.models import Device
from peftcli.recipe.schema import Recipe
from peftcli.run_dir import RunDir
from peftcli.train.plan import Plan


def sft_config(recipe: Recipe, plan: Plan, device: Device, folder: RunDir) -> SFTConfig:
    """TRL's configuration of this run; rows arrive tokenised, so TRL prepares nothing."""
    training, evaluation = recipe.training, recipe.evaluation
    evaluates = plan.eval_steps is not None
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folder.path / "tracking"))
    return SFTConfig(
        output_dir=str(folder.checkpoints.absolute()),
        run_name=folder.path.name,
        # how long and how fast
        max_steps=plan.steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=training.schedule,
        warmup_steps=plan.warmup_steps,
        optim=recipe.optimizer,
        weight_decay=training.weight_decay,
        adam_beta1=training.adam_beta1,
        adam_beta2=training.adam_beta2,
        adam_epsilon=training.adam_epsilon,
        max_grad_norm=training.max_grad_norm,
        neftune_noise_alpha=training.neftune_noise_alpha,
        # how much at a time
        # The collator cuts a step into micro-batches, so a batch is the whole step.
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=evaluation.batch_size or plan.micro_batch_size,
        gradient_accumulation_steps=1,
        gradient_checkpointing=plan.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if plan.checkpointing else None,
        # numbers
        bf16=device.dtype == "bfloat16",
        fp16=device.dtype == "float16" and device.kind == "cuda",
        use_cpu=device.kind == "cpu",
        logging_nan_inf_filter=False,
        seed=recipe.seed,
        data_seed=recipe.seed,
        # data
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=False,
        remove_unused_columns=False,
        dataloader_pin_memory=device.kind == "cuda",
        accelerator_config={"non_blocking": device.kind == "cuda"},
        # when to look and what to keep
        logging_steps=1,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=plan.eval_steps,
        save_strategy="steps",
        save_steps=plan.save_steps,
        load_best_model_at_end=evaluates and evaluation.keep_best,
        metric_for_best_model="eval_loss" if evaluates else None,
        greater_is_better=False if evaluates else None,
        # talk
        report_to=list(training.report_to) or "none",
        disable_tqdm=True,
        log_level="error",
    )
