"""Whether vLLM can serve an adapter unmerged, decided from its configuration."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from peftcli.errors import PeftcliError
from peftcli.merge.refuse import check_config
from peftcli.merge.source import AdapterSource

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values that --max-lora-rank takes
DEFAULT_RANK = 16
INITS = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")
REFUSED = {
    "use_dora": "DoRA scales every output by its norm",
    "modules_to_save": "whole modules were trained (modules_to_save)",
    "layer_replication": "layers are replicated",
    "alora_invocation_tokens": "aLoRA is active on some tokens only",
    "use_qalora": "QA-LoRA works on pooled inputs",
    "trainable_token_indices": "embedding rows were trained (trainable_token_indices)",
    "lora_bias": "the update has a bias (lora_bias)",
}


@dataclass(frozen=True)
class Servability:
    """The answer, and how."""

    servable: bool
    reasons: tuple[str, ...]
    """Why not."""
    rank: int
    """The largest rank of any module."""
    flags: tuple[str, ...]
    """What to give to `vllm serve BASE`."""
    notes: tuple[str, ...]
    instead: str
    """What to do where it cannot."""


def check_servable(adapter: AdapterSource) -> Servability:
    """What vLLM's own check of adapter_config.json would say."""
    config = adapter.config
    reasons = [text for key, text in REFUSED.items() if config.get(key)]
    if config.get("peft_type") != "LORA":
        reasons.append(f"{config.get('peft_type')} adapters are not LoRA")
    if config.get("bias") not in (None, "none"):
        reasons.append(f"biases of the base were trained (bias: {config['bias']})")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(INITS):
        reasons.append(f"its start rewrote the base (init_lora_weights: {start})")
    rank = max([int(config.get("r") or 0), *map(int, (config.get("rank_pattern") or {}).values())])
    allowed = next((value for value in RANKS if value >= rank), None)
    if allowed is None:
        reasons.append(f"rank {rank} is above {RANKS[-1]}, the highest vLLM takes")
    flags: tuple[str, ...] = ()
    if not reasons:
        name = adapter.run.path.name if adapter.run is not None else adapter.folder.name
        flags = ("--enable-lora", "--lora-modules", f"{name}={adapter.folder}")
        if allowed is not None and allowed > DEFAULT_RANK:
            flags = (*flags, "--max-lora-rank", str(allowed))
    return Servability(
        not reasons, tuple(reasons), rank, flags, tuple(_notes(adapter)), _instead(adapter)
    )


def _instead(adapter: AdapterSource) -> str:
    try:
        check_config(adapter.name, adapter.config)
    except PeftcliError as error:
        return error.hint
    return f"merge it: peftcli merge {shlex.quote(adapter.name)}"


def _notes(adapter: AdapterSource) -> list[str]:
    """What it will not say by itself."""
    config, notes = adapter.config, []
    recipe = adapter.recipe()
    if recipe is not None and recipe.method.few_bits:
        notes.append(
            "it was trained on a base in few bits, and vLLM puts it on the 16-bit one: "
            "peftcli merge measures how far the two are apart, and its result has no such gap"
        )
    targets = config.get("target_modules")
    named = targets if isinstance(targets, list) else [str(targets)]
    if any(name.rpartition(".")[2] in ("embed_tokens", "lm_head") for name in named):
        notes.append("embeddings are among the targets: compare its answers with peftcli eval")
    if config.get("target_parameters"):
        notes.append("experts are among the targets: support depends on the model and the version")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        notes.append("alpha_pattern and rank_pattern are read by recent versions only")
    return notes
