"""Run a recipe: base model + rows -> tuned adapter in a run folder."""

from __future__ import annotations

import shutil
import warnings
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import disable_progress_bars
from peft import PeftModel, initialize_lora_eva_weights
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)

from peftcli.errors import InterruptedRun, NumericalError, ResourceError, UsageError
from peftcli.events import Listener, Note, Warned
from peftcli.fingerprint import FILE_NAME, Fingerprint, fingerprint
from peftcli.models import base_folder, go_offline, load_base, wrap
from peftcli.recipe.load import LoadedRecipe, recipe_text
from peftcli.recipe.schema import Recipe
from peftcli.run_dir import RunDir, Status, clear, locked, open_run, publish_folder, write_atomic
from peftcli.train import checkpoints, resume
from peftcli.train.card import model_card
from peftcli.train.collator import Collator
from peftcli.train.config import sft_config
from peftcli.train.hub import check_upload, upload
from peftcli.train.manifest import describe
from peftcli.train.monitor import Interruption, Monitor, peak_memory_gib
from peftcli.train.plot import plot_losses
from peftcli.train.setting import Setting, settle
from peftcli.train.trainer import RecipeTrainer


@dataclass(frozen=True)
class Options:
    """What the command line adds to the recipe."""

    resume: bool = False
    overwrite: bool = False
    force: bool = False
    offline: bool = False
    push_to_hub: str | None = None


@dataclass(frozen=True)
class TrainResult:
    """What a finished run left."""

    output: Path
    result: Path
    """The adapter folder, or the model folder after full fine-tuning."""
    steps: int
    seconds: float
    final_loss: float
    best_eval_loss: float | None
    best_step: int | None
    trainable_parameters: int
    peak_memory_gib: float
    tokens_per_second: float


def run(loaded: LoadedRecipe, options: Options, tell: Listener) -> TrainResult:
    """Train what the recipe says; raises PeftcliError with the exit code of what went wrong.

    The run folder is consistent at every moment: its manifest says running, interrupted, failed
    or finished, and checkpoints and results appear complete or not at all.
    """
    recipe = loaded.recipe
    folder = open_run(Path(recipe.output), resume=options.resume, overwrite=options.overwrite)
    quiet_libraries()
    if options.offline:
        go_offline()
    if options.push_to_hub:
        check_upload(options.push_to_hub)
    with locked(folder), ExitStack() as stack:
        interruption = stack.enter_context(Interruption(tell))
        if options.overwrite:
            clear(folder)
        for text in recipe.warnings():
            tell(Warned(text))
        setting = settle(loaded)
        refuse_what_cannot_fit(setting, options, tell)
        result = _train(recipe, setting, folder, options, interruption, tell)
    if options.push_to_hub:
        tell(Note(f"uploaded to {upload(result.result, options.push_to_hub)}"))
    return result


def _train(
    recipe: Recipe,
    setting: Setting,
    folder: RunDir,
    options: Options,
    interruption: Interruption,
    tell: Listener,
) -> TrainResult:
    model = load_model(recipe, setting)
    files = base_folder(recipe.model)
    identity = fingerprint(files) if files else None
    trainable, total = count_trained(model), setting.architecture.parameters()
    if trainable == 0:
        raise UsageError("method: nothing would be trained", "check target_modules and layers")
    manifest = describe(
        recipe,
        base=identity,
        base_folder=files,
        tokenizer=setting.tokenizer,
        data=setting.prepared.report,
        plan=setting.plan,
        device=setting.device,
        trainable=trainable,
        total=total,
    )
    checkpoint = None
    if options.resume:
        resume.check_unchanged(folder, manifest, force=options.force, tell=tell)
        checkpoint = checkpoints.newest(folder.checkpoints, lambda text: tell(Warned(text)))
        tell(Note(f"resuming from {checkpoint.name}" if checkpoint else "starting from step 0"))
    folder.write_manifest(manifest)
    write_atomic(folder.recipe, recipe_text(recipe))
    _tell_plan(setting, trainable, total, tell)
    monitor = Monitor(
        folder.metrics, tell, _tokens_per_step(setting), recipe.training.max_nonfinite_steps
    )
    trainer = build_trainer(recipe, setting, folder, model, [monitor, interruption])
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except torch.cuda.OutOfMemoryError:
        _finish(folder, manifest, "failed")
        raise out_of_memory(setting) from None
    except BaseException:
        _finish(folder, manifest, "failed")
        raise
    finally:
        monitor.close()
    _refuse_bad_end(monitor, interruption, folder, manifest, trainer.state.global_step)
    result = publish(recipe, trainer, setting, folder, identity)
    plot_losses(folder.loss_plot, monitor.losses, monitor.eval_losses)
    done = TrainResult(
        output=folder.path,
        result=result,
        steps=trainer.state.global_step,
        seconds=monitor.seconds(),
        final_loss=monitor.losses[-1][1],
        best_eval_loss=monitor.best_loss,
        best_step=trainer.state.best_global_step,
        trainable_parameters=trainable,
        peak_memory_gib=peak_memory_gib(),
        tokens_per_second=monitor.tokens_per_second(trainer.state.global_step),
    )
    _finish(folder, manifest, "finished", result=done)
    return done


def load_model(recipe: Recipe, setting: Setting) -> PreTrainedModel | PeftModel:
    """The base on its device, with the recipe's untrained adapter around it."""
    set_seed(recipe.seed)
    method = recipe.method
    weights = replace(setting.device, dtype=method.weights_dtype(setting.device.dtype))
    base = load_base(recipe.model, weights, method.quantization_config(setting.device.dtype))
    config = method.peft_config(setting.architecture)
    if config is None:
        return base
    model = wrap(base, config)
    if method.initializes_from_data:
        rows = setting.train.select(range(min(64, len(setting.train))))
        loader = DataLoader(rows, batch_size=4, collate_fn=Collator(setting.tokenizer.pad_token_id))
        initialize_lora_eva_weights(model, loader, show_progress_bar=False)
    return model


def build_trainer(
    recipe: Recipe,
    setting: Setting,
    folder: RunDir,
    model: PreTrainedModel | PeftModel,
    callbacks: list[TrainerCallback],
) -> RecipeTrainer:
    """The trainer of this run; trained parameters are float32 whatever the base is."""
    patience = recipe.evaluation.early_stopping
    if patience is not None:
        threshold = recipe.evaluation.early_stopping_threshold
        callbacks = [*callbacks, EarlyStoppingCallback(patience, threshold)]
    trainer = RecipeTrainer(
        model=model,
        args=sft_config(recipe, setting.plan, setting.device, folder),
        train_dataset=setting.train,
        eval_dataset=setting.eval,
        tokenizer=setting.tokenizer,
        callbacks=callbacks,
        learning_rate_multipliers=recipe.method.learning_rate_multipliers(),
        keep_checkpoints=recipe.training.keep_checkpoints,
    )
    trainer.remove_callback(PrinterCallback)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL rounds adapters on a 4-bit base to bfloat16
            parameter.data = parameter.data.float()
    return trainer


def publish(
    recipe: Recipe,
    trainer: RecipeTrainer,
    setting: Setting,
    folder: RunDir,
    identity: Fingerprint | None,
) -> Path:
    """Put the trained adapter or model, with all that serving needs, in the run folder."""
    target = folder.adapter if recipe.method.saves_adapter else folder.model
    staging = target.with_name(f".staging-{target.name}")
    shutil.rmtree(staging, ignore_errors=True)
    model = trainer.model
    model.config.use_cache = True  # the trainer turned it off
    stops = [*setting.prepared.report.end_of_turn, setting.tokenizer.eos_token_id]
    model.generation_config.eos_token_id = list(dict.fromkeys(stops))
    model.generation_config.pad_token_id = setting.tokenizer.pad_token_id
    model.save_pretrained(str(staging))
    setting.tokenizer.save_pretrained(str(staging))
    model.generation_config.save_pretrained(str(staging))
    if identity is not None:
        (staging / FILE_NAME).write_text(identity.to_json(), encoding="utf-8")
    (staging / "README.md").write_text(model_card(recipe, trainer.state), encoding="utf-8")
    publish_folder(staging, target)
    return target


def count_trained(model: torch.nn.Module) -> int:
    """How many values the optimizer will change."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def refuse_what_cannot_fit(setting: Setting, options: Options, tell: Listener) -> None:
    """Raise ResourceError before the weights load when the estimate leaves no hope."""
    estimate = setting.estimate
    if estimate is None or estimate.verdict != "does not fit":
        return
    memory = estimate.memory
    text = (
        f"this run needs about {memory.needed_gib:.1f} GiB and {setting.device.name} has "
        f"{memory.available_gib:.1f} GiB free"
    )
    if options.force:
        tell(Warned(f"--force: {text}"))
        return
    ways = "; ".join(f"{x.line} (saves {x.saves_gib:.1f} GiB)" for x in estimate.changes)
    raise ResourceError(text, f"write one of: {ways}; --force tries anyway")


def out_of_memory(setting: Setting) -> ResourceError:
    """The error of a run that did not fit, with the cheapest ways out."""
    plan, device = setting.plan, setting.device
    longest = setting.prepared.report.train.length_max
    ways = []
    if not plan.checkpointing:
        ways.append("training.checkpointing: full")
    if plan.micro_batch_size > 1:
        ways.append(f"training.micro_batch_size: {plan.micro_batch_size // 2}")
    ways.append("data.max_length: half of what it is")
    return ResourceError(
        f"{device.name} ran out of memory: {peak_memory_gib():.1f} of {device.memory_gib:.1f} GiB "
        f"at {plan.micro_batch_size} rows of up to {longest} tokens",
        "write one of: " + "; ".join(ways),
    )


def quiet_libraries() -> None:
    """What users should know reaches them as events; the rest of the chatter is cut."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    disable_progress_bars()
    warnings.filterwarnings("ignore", module=r"(transformers|trl|peft|torch|accelerate|datasets)")


def _refuse_bad_end(
    monitor: Monitor,
    interruption: Interruption,
    folder: RunDir,
    manifest: dict[str, Any],
    step: int,
) -> None:
    if monitor.failure:
        _finish(folder, manifest, "failed")
        raise NumericalError(
            f"training stopped: {monitor.failure}",
            "lower training.learning_rate, or try model.dtype: bfloat16; the last checkpoint is "
            f"in {folder.checkpoints}",
        )
    if interruption.received and step < manifest["plan"]["steps"]:
        _finish(folder, manifest, "interrupted")
        raise InterruptedRun(
            f"stopped by {interruption.received} at step {step} of {manifest['plan']['steps']}; "
            "a checkpoint is saved",
            "the same command with --resume goes on",
        )


def _finish(
    folder: RunDir, manifest: dict[str, Any], status: Status, result: TrainResult | None = None
) -> None:
    manifest["status"] = status
    if result is not None:
        values = asdict(result)
        manifest["result"] = values | {"output": str(result.output), "result": result.result.name}
    folder.write_manifest(manifest)


def _tokens_per_step(setting: Setting) -> float:
    tokens = setting.prepared.report.train.tokens
    return tokens / len(setting.train) * setting.plan.micro_batch_size * setting.plan.accumulation


def _tell_plan(setting: Setting, trainable: int, total: int, tell: Listener) -> None:
    report = setting.prepared.report
    for text in report.warnings:
        tell(Warned(text))
    tell(Note(f"{setting.device.name}, {setting.device.dtype}"))
    share = trainable / total
    tell(Note(f"{trainable:,} parameters are trained, {share:.2%} of the base's {total:,}"))
    for reason in setting.plan.reasons:
        tell(Note(reason))
