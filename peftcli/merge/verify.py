"""The merged folder, loaded from disk, versus base + adapter on real prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, PreTrainedModel

from peftcli.errors import NumericalError
from peftcli.merge.adapter import LoadedAdapter
from peftcli.merge.base import Base
from peftcli.merge.prompts import Prompts
from peftcli.merge.quantized import Quantization
from peftcli.merge.result import Distance, Verification

Logits = list[torch.Tensor]
FP32_BOUND = 1e-4  # float32 sums in another order
NOISE_FACTOR = 3.0
FALLBACK_BOUND = 0.1  # where the saved dtype overflows at run time, so that its noise is unknown


@dataclass(frozen=True)
class Subject:
    """What is verified, and what it is compared with."""

    merged: Path
    base: Base
    adapters: Sequence[LoadedAdapter]
    weights: Sequence[float]
    quantization: Quantization | None
    """How the run held its base; None when in 16 bits."""
    dequantized: bool
    """Whether the merge used that base."""
    save_dtype: torch.dtype
    device: torch.device
    routed: bool
    """Whether the model routes tokens to experts."""
    pickle: bool


def verify(subject: Subject, prompts: Prompts, tell: Callable[[str], None]) -> Verification:
    """Compare logits; raises NumericalError when the merged model is not base + adapter."""
    on_used = subject.quantization if subject.dequantized else None
    tell("verifying: base + adapter in float32")
    reference = _base_and_adapter(subject, on_used)
    expected = _logits(reference, prompts, subject.device)
    noise = None
    if subject.save_dtype != torch.float32:
        for parameter in reference.parameters():  # not the buffers, which loaders keep in float32
            parameter.data = parameter.data.to(subject.save_dtype)
        noise = distance(expected, _logits(reference, prompts, subject.device))
    _free(reference)
    tell("verifying: the merged model, from disk")
    merged = AutoModelForCausalLM.from_pretrained(
        str(subject.merged), dtype=torch.float32, device_map={"": subject.device}
    ).eval()
    found = distance(expected, _logits(merged, prompts, subject.device))
    _free(merged)
    std = torch.cat([row.flatten() for row in expected]).std().item()
    result = Verification(
        prompts=len(prompts.ids),
        tokens=prompts.tokens,
        prompts_from=prompts.where_from,
        logit_std=std,
        merged=found,
        noise=noise,
        noise_dtype=None if noise is None else str(subject.save_dtype).removeprefix("torch."),
        bound=_bound(std, noise),
        base_gap=_base_gap(subject, prompts, expected, tell),
    )
    _judge(result, subject.routed)
    return result


def distance(first: Logits, second: Logits) -> Distance:
    """How far the logits of two models are from each other; lists of (tokens, vocabulary)."""
    maximum, total, count, agreed, kl, positions = 0.0, 0.0, 0, 0, 0.0, 0
    for one, other in zip(first, second, strict=True):
        width = min(one.shape[-1], other.shape[-1])  # padded vocabularies
        one, other = one[:, :width].float(), other[:, :width].float()
        gap = (one - other).abs()
        largest = gap.max().item()
        maximum = largest if math.isnan(largest) else max(maximum, largest)
        total, count = total + gap.sum().item(), count + gap.numel()
        agreed += int((one.argmax(-1) == other.argmax(-1)).sum())
        logs, others = one.log_softmax(-1), other.log_softmax(-1)
        kl += (logs.exp() * (logs - others)).sum().item()
        positions += one.shape[0]
    return Distance(maximum, total / count, agreed / positions, max(0.0, kl / positions))


def _base_gap(
    subject: Subject, prompts: Prompts, expected: Logits, tell: Callable[[str], None]
) -> Distance | None:
    """After a 4-bit or fp8 run: the model as trained versus its adapter on the original base."""
    if subject.quantization is None:
        return None
    tell("verifying: how far the other base is")
    other = _base_and_adapter(subject, None if subject.dequantized else subject.quantization)
    found = _logits(other, prompts, subject.device)
    _free(other)
    return distance(expected, found) if subject.dequantized else distance(found, expected)


def _base_and_adapter(subject: Subject, quantization: Quantization | None) -> PreTrainedModel:
    """The adapter on its base by PEFT, unmerged, in float32."""
    base = _base(subject, quantization)
    rows = [adapter.vocabulary for adapter in subject.adapters if adapter.vocabulary]
    if rows:
        base.resize_token_embeddings(max(rows), mean_resizing=False)
    model = PeftModel.from_pretrained(base, str(subject.adapters[0].source.folder), "adapter0")
    names = ["adapter0"]
    for place, adapter in enumerate(subject.adapters[1:], start=1):
        names.append(f"adapter{place}")
        model.load_adapter(str(adapter.source.folder), names[-1])
    model.base_model.set_adapter(names)
    for name, weight in zip(names, subject.weights, strict=True):
        for module in model.modules() if weight != 1 else ():
            if isinstance(module, LoraLayer):
                module.set_scale(name, weight)
    return model.eval()


def _base(subject: Subject, quantization: Quantization | None) -> PreTrainedModel:
    folder, device = subject.base.folder, subject.device
    if quantization is not None:
        return quantization.load(folder, device, pickle=subject.pickle)
    base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        str(folder),
        dtype=torch.float32,
        device_map={"": device},
        use_safetensors=not subject.pickle,
        trust_remote_code=False,
    )
    return base


def _logits(model: PreTrainedModel, prompts: Prompts, device: torch.device) -> Logits:
    with torch.inference_mode():
        return [
            model(input_ids=row[None].to(device), use_cache=False).logits[0].float().cpu()
            for row in prompts.ids
        ]


def _free(model: PreTrainedModel) -> None:
    """Give the weights' memory back now: modules are kept alive by cycles."""
    for parameter in model.parameters():
        parameter.data = torch.empty(0, dtype=parameter.dtype)


def _bound(std: float, noise: Distance | None) -> float:
    """The largest believable difference of one logit, growing with the model's own scale."""
    scale = max(1.0, std)
    if noise is None:
        return FP32_BOUND * scale
    if not math.isfinite(noise.maximum):
        return FALLBACK_BOUND * scale
    return max(NOISE_FACTOR * noise.maximum, FP32_BOUND * scale)


def _judge(result: Verification, routed: bool) -> None:
    found, noise = result.merged, result.noise
    near = found.maximum <= result.bound
    if noise is not None and math.isfinite(noise.mean):
        # Experts may swap on a near tie, which moves single logits far and the mean hardly.
        usual = found.mean <= max(NOISE_FACTOR * noise.mean, FP32_BOUND)
        near = usual and (near or routed)
    if near:
        return
    raise NumericalError(
        f"the merged model is not base + adapter: logits differ by up to {found.maximum:.3g} "
        f"(mean {found.mean:.3g}), accepted are {result.bound:.3g}; nothing was published",
        "merge with --save-dtype float32; if that fails too, the base is another one than the "
        "adapter's, or this adapter is of a kind that is merged wrongly: please report it",
    )
