"""How a trainer keeps checkpoints: written aside and renamed, read without running their code."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from trl import SFTTrainer

from peftcli.train import checkpoints


class SavingTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer whose checkpoints are complete or not there."""

    def __init__(self, *, keep_checkpoints: int, **arguments: Any) -> None:
        self._keep = keep_checkpoints
        self.unevaluated = False
        """Whether the next checkpoint comes before an evaluation that was due."""
        self._staging: Path | None = None
        super().__init__(**arguments)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        with checkpoints.loading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with checkpoints.loading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with checkpoints.loading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or self.args.output_dir)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir)
        step = self.state.global_step
        self._staging = folder / checkpoints.STAGING
        shutil.rmtree(self._staging, ignore_errors=True)
        self._staging.mkdir(parents=True)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            # TRL's own method also writes a model card into the parent folder.
            Trainer._save_checkpoint(self, model, trial)
            written = self._staging / f"checkpoint-{step}"
            best = self.state.best_global_step
            if best:
                self.state.best_model_checkpoint = str(folder / f"checkpoint-{best}")
                self.state.save_to_json(str(written / "trainer_state.json"))
            if self.unevaluated:
                (written / checkpoints.UNEVALUATED).touch()
            checkpoints.publish(written, folder / f"checkpoint-{step}")
        finally:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None
            self.args.save_total_limit = limit
        checkpoints.rotate(folder, self._keep, self.state.best_global_step, step)
