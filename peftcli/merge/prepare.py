"""Everything a merge decides before the first byte is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from peftcli.errors import ArtefactError, ResourceError, UsageError
from peftcli.merge.adapter import LoadedAdapter, load_adapter
from peftcli.merge.base import Base, find_base, read_config
from peftcli.merge.bring import check_links
from peftcli.merge.checkpoint import Stored, read_checkpoint
from peftcli.merge.choice import Choice, choose_base
from peftcli.merge.combine import combined
from peftcli.merge.compute import Arithmetic
from peftcli.merge.identity import check_belongs, trained_on_stored
from peftcli.merge.options import DENSITY, MergeOptions, WeightedAdapter, check_combination
from peftcli.merge.plan import Changes, Plan, make_plan
from peftcli.merge.quantized import Quantization
from peftcli.merge.refuse import check_mergeable
from peftcli.merge.result import BaseUsed
from peftcli.merge.skeleton import (
    Place,
    Unknown,
    check_shapes,
    input_embedding,
    is_tied,
    output_embedding,
    places,
    skeleton,
)
from peftcli.merge.source import AdapterSource
from peftcli.models import DTYPES, LOAD_ERRORS
from peftcli.untrusted import custom_code

Tell = Callable[[str], None]
Places = Mapping[str, Place | Unknown | None]


@dataclass(frozen=True)
class Inputs:
    """What is merged into what."""

    sources: Sequence[AdapterSource]
    weights: Sequence[float]
    base: Base


@dataclass(frozen=True)
class Prepared:
    """A merge that can start."""

    adapters: Sequence[LoadedAdapter]
    weights: Sequence[float]
    base: Base
    used: BaseUsed
    config: dict[str, Any]
    """The base's config.json."""
    plan: Plan
    arithmetic: Arithmetic
    quantization: Quantization | None
    """How the base was held in training, or is taken to have been; None for 16 bits."""
    save_dtype: torch.dtype | None
    parameters: int
    vocabulary: int
    """Rows of the base's embedding."""
    routed: bool
    """Whether the model routes tokens to experts."""
    warnings: tuple[str, ...]


def locate(named: Sequence[WeightedAdapter], options: MergeOptions) -> Inputs:
    """The adapters, each of a kind that merges, and the base of the first."""
    if not named:
        raise UsageError("nothing to merge", "name a run folder, or adapters with --adapter")
    check_combination(options.combine, options.density, len(named))
    sources = [check_mergeable(one.path, offline=options.offline) for one in named]
    base = find_base(
        sources[0], options.base_model, offline=options.offline, pickle=options.allow_pickle
    )
    return Inputs(sources, [one.weight for one in named], base)


def _unproved(base: Base, source: AdapterSource) -> str:
    return (
        f"{source.name} was trained on a checkpoint that is stored quantised: nothing here tells "
        f"whether that was made from {base.name}; compare their answers with `peftcli eval`"
    )


def prepare(inputs: Inputs, options: MergeOptions, tell: Tell) -> Prepared:
    """Check that base and adapters belong together, and plan the result."""
    values = read_config(inputs.base)
    for source in inputs.sources:
        check_belongs(source, inputs.base)
        check_links(inputs.base, source, values)
    choice = choose_base(inputs.sources, options.base)
    tell(f"base: {inputs.base.name}, {choice.kind} weights: {choice.why}")
    config = load_config(inputs.base)
    model = skeleton(config, None)
    stored = read_checkpoint(inputs.base.folder, allow_pickle=options.allow_pickle)
    found = places(model, stored)
    check_shapes(model, stored, found)
    device = _device(options)
    adapters = _load(inputs, config, options, device)
    density = DENSITY if options.density is None else options.density
    changes = combined(adapters, inputs.weights, options.combine, density)
    save_dtype = DTYPES[options.save_dtype] if options.save_dtype else None
    rounds = choice.quantization if choice.kind == "dequantized" else None
    plan = make_plan(
        model,
        stored,
        found,
        _without_base_values(changes, stored, found, model),
        save_dtype=save_dtype,
        quantized=rounds.parameters(config) if rounds else {},
    )
    return Prepared(
        adapters=adapters,
        weights=inputs.weights,
        base=inputs.base,
        used=_used(inputs.base, choice, plan),
        config=values,
        plan=plan,
        arithmetic=Arithmetic(device, options.fp32, rounds),
        quantization=choice.quantization,
        save_dtype=save_dtype,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocabulary=_vocabulary(model),
        routed=any(".experts." in name for name, _ in model.named_parameters()),
        warnings=(
            *(text for adapter in adapters for text in adapter.warnings),
            *(
                _unproved(inputs.base, source)
                for source in inputs.sources
                if trained_on_stored(source)
            ),
        ),
    )


def load_config(base: Base) -> PreTrainedConfig:
    """The base's configuration; its own Python code is never run."""
    try:
        return AutoConfig.from_pretrained(str(base.folder), trust_remote_code=False)
    except LOAD_ERRORS as error:
        text = " ".join(str(error).split())[:200]
        code = "; ".join(custom_code(base.folder))
        if code and "custom code" in text:
            text = f"it needs Python code of its own, which was not run: {code}"
        raise ArtefactError(
            f"base model {base.name}: its configuration does not load: {text}",
            "models that need their own Python code are not merged here",
        ) from None


def _load(
    inputs: Inputs, config: PreTrainedConfig, options: MergeOptions, device: torch.device
) -> list[LoadedAdapter]:
    linear = options.combine == "linear"
    return [
        load_adapter(
            source,
            config,
            weight=weight if linear else 1.0,
            device=device,
            allow_pickle=options.allow_pickle,
        )
        for source, weight in zip(inputs.sources, inputs.weights, strict=True)
    ]


def _device(options: MergeOptions) -> torch.device:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ResourceError("--device cuda, but PyTorch sees no GPU", "leave the option away")
    return torch.device(options.device)


def _vocabulary(model: PreTrainedModel) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _used(base: Base, choice: Choice, plan: Plan) -> BaseUsed:
    held = choice.quantization
    return BaseUsed(
        name=base.name,
        folder=base.folder,
        commit=base.commit,
        kind=choice.kind,
        why=choice.why,
        quantization=held.kind if held else None,
        tensors_dequantized=sum(item.dequantized for item in plan.items),
    )


def _without_base_values(
    changes: Changes, stored: Mapping[str, Stored], found: Places, model: PreTrainedModel
) -> Changes:
    """Leave out embeddings that came with the adapter and are the base's own."""
    names = {place.parameter: name for name, place in found.items() if isinstance(place, Place)}
    if is_tied(model):  # the files hold one of the two
        both = [f"{module(model)}.weight" for module in (input_embedding, output_embedding)]
        held = next((names[parameter] for parameter in both if parameter in names), None)
        names |= {parameter: held for parameter in both if held and parameter not in names}
    carried = {}
    for parameter, update in changes.carried.items():
        name, value = names.get(parameter), update.content[0]
        if name is not None and stored[name].shape[0] >= value.shape[0]:
            base = stored[name].read(slice(0, value.shape[0]))
            if torch.equal(base.to(value.dtype), value):
                continue
        carried[parameter] = update
    return replace(changes, carried=carried)
