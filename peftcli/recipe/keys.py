"""A key that the schema does not know: which one was meant, or where it belongs."""

from __future__ import annotations

from difflib import get_close_matches

from peftcli.methods import METHODS
from peftcli.recipe.document import Document, Path, dotted
from peftcli.recipe.schema import SECTIONS, Recipe

# What other tools call it, and what it is called here.
FOREIGN_KEYS = {
    "base_model": "model",
    "model_name_or_path": "model",
    "r": "method.rank",
    "lora_r": "method.rank",
    "lora_rank": "method.rank",
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    "lora_target": "method.target_modules",
    "lora_target_modules": "method.target_modules",
    "layers_to_transform": "method.layers",
    "init_lora_weights": "method.init",
    "adapter": "method.name",
    "finetuning_type": "method.name",
    "load_in_4bit": "method: {name: qlora}",
    "use_double_quant": "method.double_quantization",
    "dataset": "data.train",
    "datasets": "data.train",
    "train_file": "data.train",
    "val_size": "data.eval",
    "val_set_size": "data.eval",
    "max_seq_length": "data.max_length",
    "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "template": "data.chat_template",
    "lr": "training.learning_rate",
    "num_train_epochs": "training.epochs",
    "num_epochs": "training.epochs",
    "per_device_train_batch_size": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.batch_size (the effective batch)",
    "lr_scheduler_type": "training.schedule",
    "lr_scheduler": "training.schedule",
    "warmup_ratio": "training.warmup",
    "warmup_steps": "training.warmup",
    "optim": "training.optimizer",
    "gradient_checkpointing": "training.checkpointing",
    "sample_packing": "training.packing",
    "eval_steps": "evaluation.steps",
    "early_stopping_patience": "evaluation.early_stopping",
    "output_dir": "output",
}


def unknown_key(path: Path, document: Document) -> str:
    """The sentence about a key that is not in its section."""
    key = str(path[-1])
    known = _fields(path[:-1], document)
    if path[0] == "method" and _owners(key):
        own = _method_name(document)
        return f"`{own}` has no such key; it belongs to {' and '.join(_owners(key))}"
    section, dot, inner = key.partition(".")
    if dot and section in known:
        return f"unknown key; write `{inner}` on a line of its own below `{section}:`"
    near = get_close_matches(key, known, n=1, cutoff=0.6)
    if near:
        return f"unknown key; did you mean `{near[0]}`?"
    if key in FOREIGN_KEYS:
        return f"unknown key; here it is `{FOREIGN_KEYS[key]}`"
    elsewhere = [dotted(place) for place in _all_keys() if place[-1] == key]
    if elsewhere:
        return f"unknown key here; it belongs at `{elsewhere[0]}`"
    return f"unknown key; the keys here are {', '.join(known)}"


def _fields(path: Path, document: Document) -> list[str]:
    """The keys that the schema knows in the section at `path`."""
    names = [part for part in path if isinstance(part, str)]
    if not names:
        return list(Recipe.model_fields)
    if names[0] == "method":
        method = METHODS.get(_method_name(document), METHODS["lora"])
        return list(method.model_fields)
    return list(SECTIONS[names[-1]].model_fields) if names[-1] in SECTIONS else []


def _method_name(document: Document) -> str:
    method = document.values.get("method")
    return str(method.get("name")) if isinstance(method, dict) else str(method)


def _owners(key: str) -> list[str]:
    return [name for name, method in METHODS.items() if key in method.model_fields]


def _all_keys() -> list[Path]:
    keys: list[Path] = [(key,) for key in Recipe.model_fields]
    for name in ("model", "data", "training", "evaluation"):
        keys += [(name, key) for key in SECTIONS[name].model_fields]
    return [*keys, *(("method", key) for method in METHODS.values() for key in method.model_fields)]
