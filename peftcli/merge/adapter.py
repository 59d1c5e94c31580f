"""An adapter folder -> the update of each parameter, with every tensor accounted for.

PEFT itself wraps the base on the meta device, so that which module is changed, and by which rank
and scale, is PEFT's own answer, without a byte of the base in memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedConfig, PreTrainedModel

from peftcli.errors import ArtefactError
from peftcli.merge.deltas import Update, whole_value
from peftcli.merge.skeleton import skeleton
from peftcli.merge.source import AdapterSource
from peftcli.merge.tensors import matching, read_tensors, vocabulary_of
from peftcli.merge.updates import plain_name, updates_of
from peftcli.models import LOAD_ERRORS
from peftcli.untrusted import check_patterns


@dataclass(frozen=True)
class LoadedAdapter:
    """What an adapter changes."""

    source: AdapterSource
    method: str
    updates: Mapping[str, list[Update]]
    """Parameter of the model -> its updates, in the order they apply."""
    carried: Mapping[str, Update]
    """Parameter -> values of the base that came with the adapter, such as grown embeddings."""
    vocabulary: int | None
    """Rows of its embeddings, where they are not the base's own number."""
    tied_rows: bool
    """Whether its token rows are those of a tied output head too."""
    warnings: tuple[str, ...]


def load_adapter(
    source: AdapterSource,
    config: PreTrainedConfig,
    *,
    weight: float,
    device: torch.device,
    allow_pickle: bool,
) -> LoadedAdapter:
    """Read an adapter for a base with this configuration; `weight` multiplies its scale.

    Raises ArtefactError when its tensors are not exactly those that its configuration has on this
    base, and NumericalError for NaN or infinite values.
    """
    tensors = read_tensors(source.folder, allow_pickle=allow_pickle)
    vocabulary = vocabulary_of(tensors, skeleton(config, None))
    base = skeleton(config, vocabulary)
    known, peft_config = _config(source)
    wrapped = _wrap(source, base, peft_config)
    trained, carried = matching(source, wrapped, tensors)
    with torch.no_grad():
        trained = {name: tensor.float().to(device) for name, tensor in trained.items()}
        updates, tied_rows = updates_of(wrapped, trained, weight)
    _check_depth(source, updates, base)
    return LoadedAdapter(
        source=source,
        method=_method(source),
        updates=updates,
        carried={
            plain_name(name): whole_value(tensor, of_base=True) for name, tensor in carried.items()
        },
        vocabulary=vocabulary,
        tied_rows=tied_rows,
        warnings=tuple(_unknown(source, known)),
    )


def _config(source: AdapterSource) -> tuple[set[str], PeftConfig]:
    """The configuration without its initialisation, which would need the base's weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config = PeftConfig.from_pretrained(str(source.folder))
        except LOAD_ERRORS as error:
            raise ArtefactError(
                f"{source.name}: adapter_config.json is not valid: {str(error)[:300]}",
                "restore the file from where the adapter came from",
            ) from None
    for name in ("init_lora_weights", "init_ia3_weights"):
        if name in vars(config):
            vars(config)[name] = False
    return {field.name for field in fields(config)}, config


def _unknown(source: AdapterSource, known: set[str]) -> Iterator[str]:
    names = sorted(set(source.config) - known - {"peft_version"})
    if names:
        yield f"{source.name}: adapter_config.json has fields that are not known: {names}"


def _wrap(source: AdapterSource, base: PreTrainedModel, config: PeftConfig) -> PeftModel:
    check_patterns(source.name, source.config, [name for name, _ in base.named_modules()])
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return get_peft_model(base, config)
        except LOAD_ERRORS as error:
            text = " ".join(str(error).split())[:300]
            raise ArtefactError(
                f"{source.name}: does not belong to this base ({base.config.model_type}): {text}",
                "name its base with --base-model",
            ) from None


def _check_depth(
    source: AdapterSource, updates: Mapping[str, list[Update]], base: PreTrainedModel
) -> None:
    """An adapter of a shallower model fits a deeper one without a word from PEFT."""
    targets = source.config.get("target_modules")
    layers = base.config.get_text_config().num_hidden_layers
    if not isinstance(targets, list) or source.config.get("layers_to_transform") is not None:
        return
    named = {part for target in targets for part in target.split(".") if part.isdecimal()}
    found = {int(part) for part in named}
    if found and found == set(range(len(found))) and len(found) < layers and updates:
        raise ArtefactError(
            f"{source.name}: tunes layers 0 to {len(found) - 1}, each named, and this base has "
            f"{layers} layers: it comes from a shallower model",
            "name its base; or, if only these layers were meant, write layers_to_transform in "
            "adapter_config.json",
        )


def _method(source: AdapterSource) -> str:
    name = str(source.config["peft_type"]).lower()
    recipe = (source.manifest or {}).get("recipe") or {}
    method = recipe.get("method")
    own = method.get("name") if isinstance(method, dict) else None
    return str(own or ("dora" if source.config.get("use_dora") else name))
