"""An adapter's tensors: read, brought to today's names, and checked against what PEFT expects."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils.transformers_weight_conversion import (
    convert_peft_adapter_state_dict_for_transformers,
)
from transformers import PreTrainedModel

from peftcli.errors import ArtefactError, NumericalError, UsageError
from peftcli.merge.checkpoint import read_pickle, read_safetensors
from peftcli.merge.skeleton import input_embedding, output_embedding
from peftcli.merge.source import AdapterSource
from peftcli.merge.updates import PREFIX

Tensors = dict[str, torch.Tensor]
# Below an embedding or output head: its values in the base, and what PEFT saves a second time.
CARRIED = tuple(
    f"{wrapper}{kind}"
    for wrapper in ("", "base_layer.", "original_module.", "token_adapter.base_layer.")
    for kind in ("weight", "bias")
)
REPEATED = (
    *("modules_to_save.weight", "modules_to_save.bias"),
    "token_adapter.trainable_tokens_delta",
)


def read_tensors(folder: Path, *, allow_pickle: bool) -> Tensors:
    """Every tensor of an adapter folder; raises NumericalError for NaN or infinite values."""
    file, pickled = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if file.is_file():
        stored = read_safetensors(file)
    elif not pickled.is_file():
        raise ArtefactError(f"{folder}: no adapter_model.safetensors", "save the adapter again")
    elif allow_pickle:
        stored = read_pickle(pickled)
    else:
        raise ArtefactError(
            f"{pickled}: a pickle, which can hold code",
            "save the adapter as safetensors, or read it restricted with --allow-pickle",
        )
    tensors = {name: entry.read() for name, entry in stored.items()}
    # NaN and infinity pass through the maximum, which is faster than looking at every value.
    broken = [name for name, tensor in tensors.items() if not _largest(tensor).isfinite()]
    if broken:
        raise NumericalError(
            f"{folder}: {len(broken)} of {len(tensors)} tensors hold NaN or infinite values: "
            f"{broken[0]}",
            "the training run diverged; merge an earlier checkpoint, or train again",
        )
    return tensors


def matching(
    source: AdapterSource, wrapped: PeftModel, tensors: Tensors
) -> tuple[Tensors, Tensors]:
    """Trained tensors under today's names, and embeddings of the base that came with them.

    Raises ArtefactError when a tensor is missing, too many, or of another shape.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        if set(tensors) - set(expected):  # experts were single modules before transformers 5
            tensors = convert_peft_adapter_state_dict_for_transformers(
                model=wrapped,
                peft_config=wrapped.peft_config["default"],
                adapter_state_dict=tensors,
                adapter_name="default",
            )
    _check_bias(source, wrapped, tensors)
    missing = sorted(set(expected) - set(tensors))
    base = wrapped.get_base_model()
    for name in _embedding_names(base, REPEATED) - set(expected):
        tensors.pop(name, None)
    names_carried = _embedding_names(base, CARRIED) - set(expected)
    unexpected = sorted(set(tensors) - set(expected) - names_carried)
    for names, kind in ((missing, "lacks"), (unexpected, "has, and its configuration does not,")):
        if names:
            raise ArtefactError(
                f"{source.name}: {kind} {len(names)} tensors on this base, such as {names[0]}",
                "it belongs to another base (another depth?), or its files are incomplete",
            )
    for name, tensor in tensors.items():
        wanted = tuple(expected[name].shape) if name in expected else None
        if wanted is not None and wanted != tuple(tensor.shape):
            raise ArtefactError(
                f"{source.name}: {name} is {tuple(tensor.shape)}, and {wanted} on this base",
                "name its base with --base-model",
            )
    carried = {name: tensors.pop(name) for name in names_carried & set(tensors)}
    return tensors, carried


def vocabulary_of(tensors: Tensors, base: PreTrainedModel) -> int | None:
    """The rows of the embeddings it carries, where they are not the base's own number."""
    own = base.get_input_embeddings().weight.shape[0]
    by_first = _embedding_names(base, (*CARRIED, "lora_B.weight"))
    by_second = _embedding_names(base, ("lora_embedding_A",))
    rows = {tensors[name].shape[0] for name in by_first & set(tensors)}
    rows |= {tensors[name].shape[1] for name in by_second & set(tensors)}
    rows.discard(own)
    return max(rows) if rows else None


def _largest(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.abs().max() if tensor.numel() else torch.zeros(())


def _embedding_names(base: PreTrainedModel, kinds: tuple[str, ...]) -> set[str]:
    """What PEFT saves beside the adapter when embeddings were targeted or resized."""
    modules = [name for name in (input_embedding(base), output_embedding(base)) if name]
    return {f"{PREFIX}{module}.{kind}" for module in modules for kind in kinds}


def _check_bias(source: AdapterSource, wrapped: PeftModel, tensors: Tensors) -> None:
    if not source.config.get("lora_bias"):
        return
    base = set(wrapped.get_base_model().state_dict())
    for name in tensors:
        module, found, _ = name.removeprefix(PREFIX).rpartition(".lora_B.bias")
        if found and not {f"{module}.base_layer.bias", f"{module}.bias"} & base:
            raise UsageError(
                f"{source.name}: lora_bias on {module}, which has no bias in the base, so there is "
                "no place to merge it into",
                "deploy base + adapter, or train without lora_bias",
            )
