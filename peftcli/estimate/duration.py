"""Seconds and money of a run, from its FLOPs, its memory traffic and the GPU's rates.

The coefficients come from steps measured on an H200.
README shows how far off they are, most on short steps. Other cards are an estimate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from peftcli.architecture.config import Linear
from peftcli.estimate.flops import flops_per_token, layer_flops, linears_of_layers, passed_targets
from peftcli.estimate.gpus import Gpu, Speed
from peftcli.estimate.layer import kept_layers, kept_per_token, scores_kept
from peftcli.estimate.memory import host_bytes
from peftcli.estimate.plan import Plan
from peftcli.estimate.updating import host_seconds, update_seconds
from peftcli.estimate.weights import weights
from peftcli.estimate.widths import has_query_norms, stream_norms

BANDWIDTH_SHARE = 1.0
LOAD_BYTES_PER_SECOND = 1.0e9
HOST_BYTES_PER_SECOND = 25e9
"""Between GPU and pinned host memory, each way: PCIe 4.0 x16 as it is usually measured. Not yet
measured here; cards with eight lanes (RTX 4060 Ti) or PCIe 3.0 (T4) have half of it."""
COPIES_BAND = (0.5, 2.0)
"""Of the seconds that such copies take: PCIe 5.0 has twice the rate, half of the lanes half."""
SETUP_SECONDS = 30.0  # imports, tokenising, the first step's warm-up
SMALL_HEADS, SMALL_HEADS_SHARE = 64, 0.68
"""Heads up to this size reach so much of what heads of 128 do: as many exponentials come with half
the products. Near what runs of the grid that are not held out took, Llama-3.2-1B with rows of 8,192
tokens (0.66 twice); packed rows, of which attention is a small part, say 0.37 and 0.43."""
BANDS: dict[Speed, tuple[float, float]] = {  # of the likely seconds
    "measured": (0.83, 1.25),
    "published": (0.75, 1.35),
    "data sheet": (0.7, 1.5),
}
HOST_BAND = (0.75, 2.0)
"""The same of what the CPU needs to start kernels. One and the same step took 0.084 and 0.042 s in
two processes of a machine that had just started, another 0.20, 0.19 and 0.30 s in three."""
Shares = tuple[float, float, float]
"""What GPU, CPU and copies between them need of what they are expected to."""
AS_EXPECTED: Shares = (1.0, 1.0, 1.0)


@dataclass(frozen=True, eq=False)
class Lengths:
    """Tokens of the rows, or of sequences of packed ones: mean and longest, and their number."""

    mean: float
    longest: float
    rows: int = 10_000
    packed: float | None = None
    """Tokens of a row among others in a sequence: it attends to itself alone."""

    def computed(self, plan: Plan) -> float:
        """Tokens of a row as it is computed: padded to the longest of its micro-batch.

        The longest of n rows grows with log n where lengths have an exponential tail.
        """
        if not plan.padded or plan.micro_batch == 1 or self.rows < 2:
            return self.mean
        share = min(1.0, math.log(plan.micro_batch) / math.log(self.rows))
        return self.mean + (self.longest - self.mean) * share


@dataclass(frozen=True, eq=False)
class Duration:
    """Seconds of a run: low, likely, high; and tokens per second while it trains."""

    seconds: tuple[float, float, float]
    step_seconds: float
    step_range: tuple[float, float]
    """Least and most seconds of a step."""
    tokens_per_second: float
    """Real tokens, padding not counted."""
    cost_usd: tuple[float, float] | None
    """Lowest seconds at the lowest price to highest seconds at the highest."""


def duration(
    plan: Plan,
    gpu: Gpu,
    steps: int,
    lengths: Lengths,
    prices: tuple[float, float] | None = None,
) -> Duration | None:
    """How long so many optimizer steps take; None for a card whose rates are not known.

    `prices` are the lowest and the highest in US dollars for an hour.
    """
    if not gpu.tflops:
        return None
    step = step_seconds(plan, gpu, lengths)
    setup = SETUP_SECONDS + weights(plan).base() / LOAD_BYTES_PER_SECOND
    likely = setup + steps * step
    least, most = (
        step_seconds(plan, gpu, lengths, shares)
        for shares in zip(BANDS[gpu.speed], HOST_BAND, COPIES_BAND, strict=True)
    )
    low, high = setup + steps * least, setup + steps * most
    cost = None
    if prices is not None:
        cost = (low / 3600 * prices[0], high / 3600 * prices[1])
    return Duration(
        seconds=(low, likely, high),
        step_seconds=step,
        step_range=(least, most),
        tokens_per_second=plan.batch * lengths.mean / step,
        cost_usd=cost,
    )


def step_seconds(plan: Plan, gpu: Gpu, lengths: Lengths, shares: Shares = AS_EXPECTED) -> float:
    """One optimizer step: its micro-batches, and the update of the trained values."""
    parts = plan.accumulation
    update = update_seconds(plan, gpu) / parts, host_seconds(plan) / parts
    return parts * micro_batch_seconds(plan, gpu, lengths, shares, update)


def cpu_share(plan: Plan, gpu: Gpu, lengths: Lengths) -> float:
    """What the CPU needs for a step, as a share of what the GPU needs; it waits, from 1 on."""
    parts = plan.accumulation
    on_gpu = parts * _gpu_seconds(plan, gpu, lengths) + update_seconds(plan, gpu)
    return (parts * _floor_seconds(plan) + host_seconds(plan)) / on_gpu


def micro_batch_seconds(
    plan: Plan,
    gpu: Gpu,
    lengths: Lengths,
    shares: Shares = AS_EXPECTED,
    update: tuple[float, float] = (0.0, 0.0),
) -> float:
    """Forward and backward pass of one micro-batch of rows, and its part of the step's update.

    That is in seconds of GPU and CPU, of which the one that needs longer is waited for.
    """
    on_gpu = shares[0] * (_gpu_seconds(plan, gpu, lengths) + update[0])
    seconds = max(on_gpu, shares[1] * (_floor_seconds(plan) + update[1]))
    carried = host_bytes(plan) * plan.micro_batch * lengths.computed(plan) / plan.tokens
    return seconds + _waiting(seconds, shares[2] * carried / HOST_BYTES_PER_SECOND)


def _gpu_seconds(plan: Plan, gpu: Gpu, lengths: Lengths) -> float:
    """What the GPU needs for it, while the CPU is ahead."""
    computed = lengths.computed(plan)
    tokens = plan.micro_batch * computed
    eager = plan.kernel == "eager"  # which masks what it has computed, where rows are packed too
    products, attention = flops_per_token(plan, computed if eager else lengths.packed or computed)
    rate = gpu.tflops * 1e12 * gpu.attained
    bandwidth = gpu.bandwidth_gb_s * 1e9 * BANDWIDTH_SHARE
    again = 1.0 + 0.4 * plan.again / plan.architecture.layers
    moved = again * (_moved(plan) + _moved_scores(plan) * computed / plan.length) / bandwidth
    expanded = passes(plan) * 2.5 * weights(plan).elements / min(bandwidth, plan.step.expansion)
    small = plan.step.launch_seconds + plan.step.launch_adapted * _adapted(plan)
    launches = small * passes(plan) * plan.architecture.layers
    weighed = plan.step.weight_traffic * _weighed(plan) * forward_passes(plan) / bandwidth
    weighed += plan.step.trained_traffic * _trained(plan) / bandwidth
    saved = layer_flops(plan) * (1 - 1 / plan.step.products_speed)
    attended = rate * plan.step.attention_share
    if plan.architecture.head_size <= SMALL_HEADS:
        attended *= SMALL_HEADS_SHARE
    each = (products - saved) / rate + attention / attended + moved
    return tokens * each + expanded + weighed + launches


def _waiting(seconds: float, copying: float) -> float:
    """What copies to host memory and back, of so many seconds each, take beyond the computation.

    A third of it is the forward pass, beside which they go; they come back beside the rest.
    """
    return max(0.0, copying - seconds / 3) + max(0.0, copying - seconds * 2 / 3)


@lru_cache(1024)
def _moved(plan: Plan) -> float:
    """Bytes per token that element-wise work of all layers moves, computing again aside."""
    layers = kept_layers(plan)
    kept = sum(kind.layers * (kept_per_token(own, kind) - scores_kept(own)) for own, kind in layers)
    adapted = 2.0 * sum(x.count * (x.inputs + x.outputs) for x in _adapted_linears(plan))
    return plan.step.traffic * kept + plan.step.adapted_traffic * adapted


@lru_cache(1024)
def _moved_scores(plan: Plan) -> float:
    """The same of the eager kernel's scores, in the longest row."""
    scores = sum(kind.layers * scores_kept(own) for own, kind in kept_layers(plan))
    return plan.step.scores_traffic * scores


def _floor_seconds(plan: Plan) -> float:
    """What the CPU needs for the kernels of one micro-batch."""
    step = plan.step
    layers = plan.architecture.layers
    each = step.floor_seconds + step.floor_quantised * bool(weights(plan).elements)
    each += step.floor_adapted * _adapted(plan)
    norms = stream_norms(plan.architecture)  # Gemma has four, and more around them
    if has_query_norms(plan.architecture) and not step.in_groups:
        norms += 1
    seconds = each * (norms + 2) / 4 * passes(plan) * layers + step.floor_again * plan.again
    if plan.magnitudes:
        weighed = sum(x.count for x in passed_targets(plan)) * forward_passes(plan)
        seconds += step.floor_magnitude * weighed
    return seconds


def _adapted(plan: Plan) -> float:
    """Adapted linears of a layer, in the mean."""
    return sum(x.count for x in _adapted_linears(plan)) / plan.architecture.layers


def _adapted_linears(plan: Plan) -> list[Linear]:
    return [x for x in passed_targets(plan) if x.kind != "head"]


def _trained(plan: Plan) -> int:
    """Weights of the base that are trained, embeddings aside: experts get whole gradients too."""
    if not plan.trains_base:
        return 0
    head = [x for x in plan.architecture.linears if x.kind == "head"]
    linears = sum(x.count * x.weights for x in (*linears_of_layers(plan), *head))
    return linears + sum(x.parameters() for x in plan.architecture.experts)


def _weighed(plan: Plan) -> int:
    """Weights whose rows are measured in each forward pass, with DoRA."""
    return sum(x.count * x.weights for x in passed_targets(plan)) if plan.magnitudes else 0


def passes(plan: Plan) -> float:
    """Passes over the layers: forward, again with checkpointing, backward."""
    return 1 + forward_passes(plan)


def forward_passes(plan: Plan) -> float:
    """Those of them that go forward."""
    return 1 + plan.again / plan.architecture.layers
