"""trainer_state.json of a checkpoint, checked before the trainer takes its word for anything."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from transformers import TrainerState

from peftcli.errors import ArtefactError
from peftcli.untrusted import read_object

NAME = "trainer_state.json"
KNOWN = frozenset(field.name for field in dataclasses.fields(TrainerState))
NUMBERS = ("epoch", "total_flos", "max_steps", "num_train_epochs", "num_input_tokens_seen")


def read(checkpoint: Path) -> dict[str, Any]:
    """The state; raises ArtefactError when it is no JSON object."""
    return read_object(checkpoint / NAME)


def damage(checkpoint: Path) -> str | None:
    """What no trainer wrote in the state of this checkpoint; None when there is nothing."""
    try:
        values = read(checkpoint)
    except ArtefactError:
        return f"{NAME} is missing or damaged"
    wrong = _wrong(values, checkpoint.name.rpartition("-")[2])
    return f"{NAME} is not as it was written: {wrong[:60]}" if wrong else None


def _wrong(values: dict[str, Any], step: str) -> str | None:
    unknown = values.keys() - KNOWN
    if unknown:
        return min(unknown)
    own, best = values.get("global_step"), values.get("best_global_step")
    if not _whole(own, 0) or str(own) != step:
        return "global_step"
    if best is not None and not (_whole(best, 0) and best <= own):
        return "best_global_step"
    if not _whole(values.get("train_batch_size"), 1):
        return "train_batch_size"
    bad = [name for name in NUMBERS if not isinstance(values.get(name, 0), int | float)]
    if not isinstance(values.get("best_metric"), int | float | None):
        bad.append("best_metric")
    history = values.get("log_history")
    if not isinstance(history, list) or not all(isinstance(line, dict) for line in history):
        bad.append("log_history")
    if not _whole_callbacks(values.get("stateful_callbacks")):
        bad.append("stateful_callbacks")
    return bad[0] if bad else None


def _whole_callbacks(callbacks: object) -> bool:
    """Whether it holds what the trainer and early stopping look up in it."""
    if not isinstance(callbacks, dict) or "TrainerControl" not in callbacks:
        return False
    kept = [entry.get("attributes") for entry in callbacks.values() if isinstance(entry, dict)]
    return len(kept) == len(callbacks) and all(
        isinstance(numbers, dict) and all(_whole(number, 0) for number in numbers.values())
        for numbers in kept
    )


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
