"""What cannot be merged, decided from adapter_config.json alone, before torch is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftcli.errors import UsageError
from peftcli.merge.source import AdapterSource, find_adapter
from peftcli.untrusted import check_adapter_config

MERGEABLE = ("LORA", "IA3", "TRAINABLE_TOKENS")
NON_LINEAR = {
    "BOTTLENECK": "bottleneck adapters are non-linear networks beside the weights",
    "PROMPT_TUNING": "a prompt is input, not a change of weights",
    "P_TUNING": "a prompt is input, not a change of weights",
    "PREFIX_TUNING": "a prefix is cached keys and values, not a change of weights",
    "MULTITASK_PROMPT_TUNING": "a prompt is input, not a change of weights",
    "ADAPTION_PROMPT": "a prompt is input, not a change of weights",
    "CPT": "a prompt is input, not a change of weights",
    "XLORA": "its mixture is computed for every token",
}
UNMERGEABLE_VARIANTS = {
    "arrow_config": "Arrow picks adapters for every token",
    "alora_invocation_tokens": "aLoRA is active on some tokens only",
    "use_qalora": "QA-LoRA works on pooled inputs",
    "monteclora_config": "MonteCLoRA samples its weights",
    "kasa_config": "KaSA changes the base",
    "use_bdlora": "block-diagonal LoRA has a layout of its own",
}
REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


def check_mergeable(source: Path, *, offline: bool = False) -> AdapterSource:
    """The adapter at `source`, if its kind can be merged.

    Raises UsageError for methods that cannot be merged, with what to do instead, and ArtefactError
    for values that no trained adapter has.
    """
    adapter = find_adapter(source, offline=offline)
    check_config(adapter.name, adapter.config)
    return adapter


def check_config(name: str, config: dict[str, Any]) -> None:
    """The same for the content of adapter_config.json; `name` is for the message."""
    kind = str(config.get("peft_type"))
    if kind in NON_LINEAR:
        raise UsageError(f"{name}: {kind} cannot be merged: {NON_LINEAR[kind]}", _instead(kind))
    if kind not in MERGEABLE:
        raise UsageError(
            f"{name}: merging {kind} is not known here", "merge it with PEFT's merge_and_unload"
        )
    task = config.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise UsageError(
            f"{name}: task {task}; causal language models are merged here",
            "merge it with PEFT's merge_and_unload",
        )
    check_adapter_config(name, config)
    if kind == "LORA":
        _check_lora(name, config)


def _check_lora(name: str, config: dict[str, Any]) -> None:
    if config.get("layer_replication"):
        raise UsageError(
            f"{name}: layer_replication makes a model of another depth, which is not merged here",
            "deploy base + adapter with PEFT",
        )
    for key, reason in UNMERGEABLE_VARIANTS.items():
        if config.get(key):
            raise UsageError(f"{name}: cannot be merged: {reason}", "deploy base + adapter")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(REWRITES_BASE):
        raise UsageError(
            f"{name}: init_lora_weights: {start} rewrote the base before training, so this adapter "
            "does not belong to the published weights",
            "convert it when saving: save_pretrained(path_initial_model_for_weight_conversion=...)",
        )


def _instead(kind: str) -> str:
    if kind == "BOTTLENECK":
        return (
            "deploy base + adapter (PeftModel.from_pretrained after importing "
            "peftcli.methods.bottleneck_tuner), or train with `method: lora`"
        )
    return "deploy base + adapter with PEFT, or train with `method: lora`"
