"""The longest batch before the first step: what does not fit fails in the first minute."""

from __future__ import annotations

import copy
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from peftcli.train import rng
from peftcli.train.trainer import RecipeTrainer


def probe_memory(trainer: RecipeTrainer) -> None:
    """Forward and backward through the longest rows; raises what a step of them raises.

    Costs no more than two micro-batches and one of the evaluation. Parameters, gradients,
    optimizer, counters and random numbers are left as they were.
    """
    state, model = rng.capture(), trainer.model_wrapped
    metrics, tokens = copy.deepcopy(trainer._metrics), trainer._total_train_tokens
    training = model.training
    ballast = _optimizer_states(trainer)
    try:
        rows = longest(trainer.train_dataset, trainer.args.per_device_train_batch_size)
        trainer.training_step(model, fullest(trainer._batches(list(rows))))
        model.zero_grad(set_to_none=True)
        if trainer.eval_dataset is not None:
            rows = longest(trainer.eval_dataset, trainer.args.per_device_eval_batch_size)
            loader = DataLoader(rows, len(rows), collate_fn=trainer._eval_batches)
            trainer.evaluation_loop(loader, "probe")
    finally:
        del ballast
        model.zero_grad(set_to_none=True)
        model.train(training)
        trainer._metrics, trainer._total_train_tokens = metrics, tokens
        rng.restore(state)


def fullest(step: dict[str, Any]) -> dict[str, Any]:
    """The two largest micro-batches of a step; the second also finds the gradients of the first."""
    parts = sorted(step["micro_batches"], key=lambda part: -part["input_ids"].numel())
    return step | {"micro_batches": parts[:2]}


def longest(rows: Dataset, count: int) -> Dataset:
    """The `count` longest rows."""
    lengths: list[int] = []
    for batch in rows.select_columns(["input_ids"]).with_format("arrow").iter(10_000):
        lengths += batch["input_ids"].combine_chunks().value_lengths().to_pylist()
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return rows.select(order[:count])


def state_bytes(optimizer: str) -> int:
    """Bytes of optimizer states for each trained value, once a step was taken."""
    moments = 1 if "lion" in optimizer else 2
    if optimizer == "sgd":
        return 0
    if optimizer == "adafactor":
        return 1
    return moments if "8bit" in optimizer else 4 * moments


def _optimizer_states(trainer: RecipeTrainer) -> list[torch.Tensor]:
    """As much memory as the first step will give to the optimizer; none where it has it already."""
    name = str(trainer.args.optim.value)
    if trainer.optimizer.state or name.startswith("paged"):
        return []
    size = state_bytes(name)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    return [torch.empty(p.numel() * size, dtype=torch.uint8, device=p.device) for p in trained]
