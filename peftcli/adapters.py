"""An adapter around its base model: a new one, or one that was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from peftcli.errors import ArtefactError, UsageError
from peftcli.models import LOAD_ERRORS
from peftcli.untrusted import check_adapter_config, check_patterns, read_object
from peftcli.weightfiles import check_folder


def wrap(base: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """The base with an untrained adapter; raises UsageError when nothing matches the targets."""
    hint = _targets_hint(base)
    try:
        return get_peft_model(base, config)
    except ValueError as error:
        raise UsageError(f"method: {error}", hint) from None


def load_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """The base with a trained adapter; raises ArtefactError when the two do not belong together."""
    from peftcli.methods import bottleneck_tuner  # registers the method with PEFT

    config = check_adapter(folder)
    check_patterns(str(folder), config, [name for name, _ in base.named_modules()])
    try:
        return PeftModel.from_pretrained(base, str(folder), use_safetensors=True)
    except LOAD_ERRORS as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise ArtefactError(
            f"{folder}: does not load on this base: {first}",
            f"name the base it was trained on ({bottleneck_tuner.__name__} is registered)",
        ) from None


def check_adapter(folder: Path) -> dict[str, Any]:
    """Its adapter_config.json; raises ArtefactError for a folder that is damaged or holds code."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise ArtefactError(f"{folder}: holds no adapter", "name a folder with adapter_config.json")
    config = read_object(file)
    check_adapter_config(str(folder), config)
    if not (folder / "adapter_model.safetensors").is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise ArtefactError(
            f"{folder}: its weights are a pickle (.bin), which can hold code"
            if pickled
            else f"{folder}: holds no adapter_model.safetensors",
            "save the adapter with safetensors, PEFT's default",
        )
    check_folder(folder)
    return config


def _targets_hint(base: PreTrainedModel) -> str:
    names = {name.rpartition(".")[2] for name, module in base.named_modules() if _linear(module)}
    listed = ", ".join(sorted(names - {"lm_head"}))
    return f"write `target_modules: all-linear`, or a list of some of {listed}"


def _linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
