"""Run a recipe: base model + rows -> tuned adapter in a run folder."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from peftcli.errors import InterruptedRun, UsageError
from peftcli.events import Listener, Note, Warned
from peftcli.fingerprint import fingerprint
from peftcli.models import base_folder, go_offline
from peftcli.recipe.load import LoadedRecipe, recipe_text
from peftcli.recipe.schema import Recipe
from peftcli.run_dir import RunDir, Status, clear, locked, open_run, write_atomic
from peftcli.train import checkpoints, resume
from peftcli.train.build import build_trainer, count_trained, load_model
from peftcli.train.hub import check_upload, upload
from peftcli.train.interruption import Interruption
from peftcli.train.manifest import describe
from peftcli.train.monitor import Monitor, peak_memory_gib
from peftcli.train.pickles import check_states
from peftcli.train.plot import plot_losses
from peftcli.train.publish import publish
from peftcli.train.quiet import quiet_libraries
from peftcli.train.refusals import (
    blown_up,
    check_trackers,
    interrupted,
    out_of_memory,
    refuse_what_cannot_fit,
)
from peftcli.train.setting import Setting, settle


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
    check_trackers(recipe.training.report_to)
    with locked(folder), ExitStack() as stack:
        interruption = stack.enter_context(Interruption(tell))
        if options.overwrite:
            clear(folder)
        for text in recipe.warnings():
            tell(Warned(text))
        try:
            setting = settle(loaded, tell)
        except KeyboardInterrupt:
            raise InterruptedRun(
                f"stopped by {interruption.received} before the first step; nothing was changed",
                "the same command starts again",
            ) from None
        refuse_what_cannot_fit(setting, tell, force=options.force)
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
        if checkpoint is not None:
            check_states(checkpoint)
        tell(Note(f"resuming from {checkpoint.name}" if checkpoint else "starting from step 0"))
    folder.write_manifest(manifest)
    write_atomic(folder.recipe, recipe_text(recipe))
    _tell_plan(setting, trainable, total, tell)
    monitor = Monitor(
        folder.metrics, tell, _tokens_per_step(setting), recipe.training.max_nonfinite_steps
    )
    trainer = build_trainer(recipe, setting, folder, model, monitor, interruption)
    tell(Note(trainer.kernels))
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt:
        _finish(folder, manifest, "interrupted")
        raise interrupted(interruption.received, folder, setting.plan.steps) from None
    except torch.cuda.OutOfMemoryError:
        _finish(folder, manifest, "failed")
        raise out_of_memory(setting) from None
    except BaseException:
        _finish(folder, manifest, "failed")
        raise
    finally:
        monitor.close()
    if monitor.failure:
        _finish(folder, manifest, "failed")
        raise blown_up(monitor.failure, folder)
    if interruption.received and trainer.state.global_step < setting.plan.steps:
        _finish(folder, manifest, "interrupted")
        raise interrupted(interruption.received, folder, setting.plan.steps)
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
