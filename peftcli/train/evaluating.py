"""How a trainer finds the held-out loss: per trained token, the same whatever the batch size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from peftcli.train.batches import Batches, model_inputs
from peftcli.train.fast.model import FastModel
from peftcli.train.saving import SavingTrainer


class EvaluatingTrainer(SavingTrainer):
    """A trainer with batches of their own for held-out rows."""

    def __init__(
        self,
        *,
        batches: Batches,
        eval_batches: Batches,
        check_interruption: Callable[[], None],
        **arguments: Any,
    ) -> None:
        self.fast: FastModel | None = None
        self._batches, self._eval_batches = batches, eval_batches
        self._check_interruption = check_interruption
        super().__init__(data_collator=batches, **arguments)

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader[Any]:
        """Held-out rows, as many at a time as `evaluation.batch_size` says."""
        self.data_collator = self._eval_batches
        try:
            loader: DataLoader[Any] = super().get_eval_dataloader(eval_dataset)
            return loader
        finally:
            self.data_collator = self._batches

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Mean loss over all trained tokens, the same whatever the batch size."""
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        # On the device: reading each sum would wait for it.
        loss_sum, tokens = torch.zeros((), dtype=torch.float64, device=self.args.device), 0
        if self.fast is not None:
            self.fast.refresh()
        for step in dataloader:
            self._check_interruption()
            tokens += step["trained_tokens"]
            for batch in self._prepare_inputs(step)["micro_batches"]:
                with torch.no_grad(), self.compute_loss_context_manager():
                    loss_sum += self._loss_sum(model, batch)
        model.train(was_training)
        loss = float(loss_sum) / tokens if tokens else math.nan
        return EvalLoopOutput(
            predictions=None,
            label_ids=None,
            metrics={f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_tokens": tokens},
            num_samples=len(self.eval_dataset),
        )

    def _loss_sum(self, model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        if self.fast is not None:
            return self.fast.loss(batch, torch.ones((), device=self.args.device)).double()
        outputs = model(**model_inputs(batch), use_cache=False, fused_lm_head=True)
        found: torch.Tensor = -outputs.log_probs.double().sum()
        return found
