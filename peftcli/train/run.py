"""Run a recipe: base model + rows -> tuned adapter in a run folder."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from peftcli.errors import InterruptedRun, PeftcliError
from peftcli.events import Listener, Note, Warned, until_nobody_listens
from peftcli.models import go_offline
from peftcli.recipe.load import LoadedRecipe
from peftcli.recipe.schema import Recipe
from peftcli.run_dir import RunDir, Status, locked
from peftcli.train.attempt import Ended, attempt, free_memory
from peftcli.train.begin import Ground, begin, check_base
from peftcli.train.build import load_model
from peftcli.train.hub import check_upload, upload
from peftcli.train.interruption import Interruption
from peftcli.train.memory import peak_memory_gib
from peftcli.train.opening import clear, open_run, sweep
from peftcli.train.plot import plot_losses
from peftcli.train.publish import publish
from peftcli.train.quiet import quiet_libraries
from peftcli.train.refusals import (
    blown_up,
    check_trackers,
    interrupted,
    refuse_what_cannot_fit,
)
from peftcli.train.setting import settle
from peftcli.train.shrink import shrunk
from peftcli.train.storage import disk_errors


@dataclass(frozen=True)
class Options:
    """What the command line adds to the recipe."""

    resume: bool = False
    overwrite: bool = False
    force: bool = False
    offline: bool = False
    push_to_hub: str | None = None
    probe_on_cpu: bool = False
    """Run the longest batch first on a CPU too; on a GPU it always is."""


@dataclass(frozen=True)
class TrainResult:
    """What a finished run left."""

    output: Path
    result: Path
    """The adapter folder, or the model folder after full fine-tuning."""
    steps: int
    seconds: float
    """Of training, those of the parts before a resume included."""
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
    recipe, tell = loaded.recipe, until_nobody_listens(tell)
    folder = open_run(Path(recipe.output), resume=options.resume, overwrite=options.overwrite)
    quiet_libraries()
    if options.offline:
        go_offline()
    if options.push_to_hub:
        check_upload(options.push_to_hub)
    check_trackers(recipe.training.report_to)
    with disk_errors(folder), locked(folder), ExitStack() as stack:
        interruption = stack.enter_context(Interruption(tell))
        try:
            result = _run(loaded, folder, options, interruption, tell)
        except KeyboardInterrupt:
            raise _stopped(interruption.received, folder) from None
    if options.push_to_hub:
        tell(Note(f"uploaded to {upload(result.result, options.push_to_hub)}"))
    return result


def _run(
    loaded: LoadedRecipe,
    folder: RunDir,
    options: Options,
    interruption: Interruption,
    tell: Listener,
) -> TrainResult:
    recipe = loaded.recipe
    sweep(folder)
    if options.overwrite:
        clear(folder)
    for text in recipe.warnings():
        tell(Warned(text))
    setting = settle(loaded, tell)
    recipe = setting.written(recipe)
    refuse_what_cannot_fit(setting, tell, force=options.force)
    ground = begin(recipe, setting, folder, resuming=options.resume, force=options.force, tell=tell)
    try:
        return _train(recipe, ground, folder, options, interruption, tell)
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | InterruptedRun)
        with suppress(OSError):  # a disk that is full; the error itself is what matters
            _finish(folder, ground.manifest, "interrupted" if stopped else "failed")
        raise


def _train(
    recipe: Recipe,
    ground: Ground,
    folder: RunDir,
    options: Options,
    interruption: Interruption,
    tell: Listener,
) -> TrainResult:
    setting, checkpoint = ground.setting, ground.checkpoint
    model, ground.model = ground.model, None  # nobody else may hold it when memory is short
    probe = setting.device.kind == "cuda" or options.probe_on_cpu
    while True:
        outcome = attempt(
            recipe, setting, folder, model, checkpoint, interruption, tell, probe=probe
        )
        if isinstance(outcome, Ended):
            break
        del model
        free_memory()
        setting, checkpoint = shrunk(recipe, ground, setting, folder, outcome, tell)
        model = load_model(recipe, setting)
    return _ended(recipe, replace(ground, setting=setting), folder, interruption, outcome)


def _ended(
    recipe: Recipe, ground: Ground, folder: RunDir, interruption: Interruption, outcome: Ended
) -> TrainResult:
    trainer, monitor, setting = outcome.trainer, outcome.monitor, ground.setting
    step = trainer.state.global_step
    if monitor.health.failure:
        raise blown_up(monitor.health.failure, folder)
    if interruption.received and step < setting.plan.steps:
        raise interrupted(interruption.received, folder, setting.plan.steps)
    check_base(recipe.model, ground.identity)
    result = publish(recipe, trainer, setting, folder, ground.identity)
    plot_losses(folder.loss_plot, monitor.losses, monitor.eval_losses)
    done = TrainResult(
        output=folder.path,
        result=result,
        steps=step,
        seconds=monitor.seconds(),
        final_loss=monitor.losses[-1][1],
        best_eval_loss=monitor.best_loss,
        best_step=trainer.state.best_global_step,
        trainable_parameters=ground.trainable,
        peak_memory_gib=peak_memory_gib(),
        tokens_per_second=monitor.tokens_per_second(step),
    )
    with suppress(OSError):  # what could not be removed at its time
        sweep(folder)
    _finish(folder, ground.manifest, "finished", result=done)
    return done


def _stopped(received: str | None, folder: RunDir) -> PeftcliError:
    """The error of a signal outside the steps."""
    manifest = folder.read_manifest()
    if manifest is None:
        return InterruptedRun(
            f"stopped by {received} before the first step; nothing was changed",
            "the same command starts again",
        )
    return interrupted(received, folder, manifest.get("plan", {}).get("steps", 0))


def _finish(
    folder: RunDir, manifest: dict[str, Any], status: Status, result: TrainResult | None = None
) -> None:
    manifest["status"] = status
    if result is not None:
        values = asdict(result)
        manifest["result"] = values | {"output": str(result.output), "result": result.result.name}
    folder.write_manifest(manifest)
