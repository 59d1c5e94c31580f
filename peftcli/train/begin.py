"""From a settled recipe to the first step: identity of the base, manifest, where to go on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from peftcli.basefiles import base_folder
from peftcli.errors import ArtefactError, UsageError
from peftcli.events import Listener, Note, Warned
from peftcli.fingerprint import Fingerprint, fingerprint
from peftcli.recipe.load import recipe_text
from peftcli.recipe.schema import Model, Recipe
from peftcli.run_dir import RunDir, write_atomic
from peftcli.train import checkpoints, resume
from peftcli.train.belong import check_belongs
from peftcli.train.build import count_trained, load_model
from peftcli.train.manifest import describe
from peftcli.train.pickles import check_states
from peftcli.train.plan import with_rows
from peftcli.train.probe import state_bytes
from peftcli.train.setting import Setting
from peftcli.train.storage import check_space

WEIGHT_BYTES = 4  # of a trained value in a checkpoint and in the result


@dataclass
class Ground:
    """What a run stands on once its model is loaded."""

    setting: Setting
    manifest: dict[str, Any]
    identity: Fingerprint | None
    checkpoint: Path | None
    trainable: int
    model: PreTrainedModel | PeftModel | None


def begin(
    recipe: Recipe,
    setting: Setting,
    folder: RunDir,
    *,
    resuming: bool,
    force: bool,
    tell: Listener,
) -> Ground:
    """Load the model, compare with the run in the folder, and write the manifest of this one."""
    before = (folder.read_manifest() or {}) if resuming else {}
    if before.get("shrunk"):
        setting = _still_shrunk(recipe, setting, folder, before["plan"])
    identity = identify(recipe.model)
    check_belongs(recipe.model, setting, base_folder(recipe.model))
    model = load_model(recipe, setting)
    if identity is None:  # the hub gave it just now
        identity = identify(recipe.model)
    check_base(recipe.model, identity)
    trainable, total = count_trained(model), setting.architecture.parameters()
    if setting.architecture.other_layers is not None and identity is not None:
        total = identity.parameters
    if trainable == 0:
        raise UsageError("method: nothing would be trained", "check target_modules and layers")
    manifest = describe(
        recipe,
        base=identity,
        base_folder=base_folder(recipe.model),
        tokenizer=setting.tokenizer,
        data=setting.prepared.report,
        plan=setting.plan,
        device=setting.device,
        trainable=trainable,
        total=total,
    )
    checkpoint = None
    if resuming:
        manifest |= {key: before[key] for key in ("shrunk", "resumed") if key in before}
        resume.check_unchanged(folder, manifest, force=force, tell=tell)
        checkpoint = _where(recipe, folder, tell)
        step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        manifest["resumed"] = [*before.get("resumed", []), step]
    check_space(folder, _disk_bytes(recipe, setting, folder, trainable))
    folder.write_manifest(manifest)
    write_atomic(folder.recipe, recipe_text(recipe))
    _tell_plan(setting, trainable, total, tell)
    return Ground(setting, manifest, identity, checkpoint, trainable, model)


def _still_shrunk(
    recipe: Recipe, setting: Setting, folder: RunDir, before: dict[str, Any]
) -> Setting:
    """The setting with what an earlier part of the run came down to: rows at a time, and mode."""
    rows = int(before["micro_batch_size"])
    if recipe.training.batch_size % rows:
        raise ArtefactError(
            f"{folder.manifest}: damaged: {rows} rows at a time do not divide the batch",
            "restore it, or start again with --overwrite",
        )
    plan = with_rows(setting.plan, rows)
    if before.get("offload") is True:
        plan = replace(plan, checkpointing=True, offload=True, lowest=None)
    elif before.get("checkpointing") is True and before.get("lowest") is None:
        plan = replace(plan, lowest=None)  # all layers, where a new plan would take some
    return replace(setting, plan=plan)


def identify(model: Model) -> Fingerprint | None:
    """The fingerprint of the base's files; None before a hub model was downloaded."""
    files = base_folder(model)
    return fingerprint(files) if files else None


def check_base(model: Model, identity: Fingerprint | None) -> None:
    """Raise ArtefactError when the base's files are no longer those that were loaded."""
    try:
        now = identify(model) if identity else None
    except (ArtefactError, UsageError, OSError) as error:
        now, reason = None, f": {error}"
    else:
        reason = ""
    if identity is not None and now != identity:
        raise ArtefactError(
            f"model: {model.name} was changed or removed while the run went on{reason}",
            "restore it; checkpoints are safe, and --resume then finishes the run",
        )


def _where(recipe: Recipe, folder: RunDir, tell: Listener) -> Path | None:
    found = checkpoints.newest(
        folder.checkpoints,
        lambda text: tell(Warned(text)),
        with_best=recipe.evaluation.keep_best,
    )
    if found is not None:
        check_states(found)
    tell(Note(f"resuming from {found.name}" if found else "starting from step 0"))
    return found


def _disk_bytes(recipe: Recipe, setting: Setting, folder: RunDir, trainable: int) -> int:
    """What the run still writes: checkpoints beyond those that make room, one aside, a result."""
    plan, each = setting.plan, WEIGHT_BYTES + state_bytes(recipe.optimizer)
    kept = min(recipe.training.keep_checkpoints, math.ceil(plan.steps / plan.save_steps))
    new = max(0, kept - len(checkpoints.steps(folder.checkpoints))) + 1
    return trainable * (new * each + WEIGHT_BYTES)


def _tell_plan(setting: Setting, trainable: int, total: int, tell: Listener) -> None:
    for text in setting.prepared.report.warnings:
        tell(Warned(text))
    tell(Note(f"{setting.device.name}, {setting.device.dtype}"))
    share = trainable / total
    tell(Note(f"{trainable:,} parameters are trained, {share:.2%} of the base's {total:,}"))
    for reason in setting.plan.reasons:
        tell(Note(reason))
