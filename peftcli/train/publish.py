"""The result of a run, with all that serving it needs."""

from __future__ import annotations

import shutil
from pathlib import Path

from peftcli.fingerprint import FILE_NAME, Fingerprint
from peftcli.recipe.schema import Recipe
from peftcli.run_dir import RunDir, publish_folder
from peftcli.train.card import model_card
from peftcli.train.setting import Setting
from peftcli.train.trainer import RecipeTrainer


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
