"""What answers cost: time to the first token, tokens per second, memory; arms take turns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

import torch

from peftcli.evaluate.arms import GIB, Loaded, switched
from peftcli.evaluate.generate import plain_decoding, timed
from peftcli.evaluate.questions import Item
from peftcli.evaluate.result import Latency
from peftcli.models import Device

BATCHES = (1, 8)
REPETITIONS = 5
NEW_TOKENS = {"cuda": 64, "cpu": 24}


@dataclass
class _Runs:
    first: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    peak: int = 0


def measure_latency(
    arms: Sequence[tuple[str, Loaded]],
    items: Sequence[Item],
    positions: int | None,
    device: Device,
) -> list[Latency]:
    """Medians over REPETITIONS turns of all arms, after one that does not count."""
    prompt = _prompt(items)
    new = NEW_TOKENS[device.kind]
    if positions is not None:
        prompt = prompt[: max(1, positions - new)]
        new = min(new, positions - len(prompt))
    if new < 3:
        return []
    found = []
    for batch in BATCHES:
        ids = torch.tensor([prompt] * batch)
        runs = [_Runs() for _ in arms]
        for turn in range(REPETITIONS + 1):
            for (name, loaded), own in zip(arms, runs, strict=True):
                _run(loaded, name, ids, new, own if turn else _Runs())
        for (name, _), own in zip(arms, runs, strict=True):
            found.append(
                Latency(
                    arm=name,
                    batch=batch,
                    prompt_tokens=len(prompt),
                    new_tokens=new,
                    first_token_seconds=median(own.first),
                    tokens_per_second=median(own.rates),
                    p95_token_seconds=sorted(own.steps)[int(0.95 * (len(own.steps) - 1))],
                    peak_gib=own.peak / GIB if device.kind == "cuda" else None,
                    repetitions=REPETITIONS,
                    interleaved=len(arms) > 1,
                )
            )
    return found


def _run(loaded: Loaded, arm: str, ids: torch.Tensor, new: int, runs: _Runs) -> None:
    model = loaded.model
    ids = ids.to(model.device)
    on_gpu = ids.is_cuda
    beside = 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        beside = torch.cuda.memory_allocated() - int(loaded.weights_gib(arm) * GIB)
    own = plain_decoding(model)
    with switched(model, arm):
        start = _now(on_gpu)
        times = timed(model, ids, new, lambda: _now(on_gpu)).times
    model.generation_config = own
    runs.first.append(times[0] - start)
    runs.rates.append(len(ids) * (len(times) - 1) / (times[-1] - times[0]))
    runs.steps += [after - before for before, after in pairwise(times)]
    if on_gpu:
        runs.peak = max(runs.peak, torch.cuda.max_memory_allocated() - beside)


def _now(on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


def _prompt(items: Sequence[Item]) -> tuple[int, ...]:
    """The prompt of median length; a document's first half where there are no prompts."""
    prompts = [item.prompt or item.ids[: max(1, len(item.ids) // 2)] for item in items]
    return sorted(prompts, key=len)[len(prompts) // 2]
