"""What fits a GPU, and the fastest setting that does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from peftcli.estimate.duration import Lengths, step_seconds
from peftcli.estimate.gpus import GIB, GPUS, Gpu, find_gpu
from peftcli.estimate.loading import loading_peak
from peftcli.estimate.memory import Peak, training_peak
from peftcli.estimate.plan import Mode, Plan
from peftcli.estimate.weights import weights

Verdict = Literal["fits", "tight", "does not fit"]
ABOUT = 1.012  # times the fastest: what a larger micro-batch gains is not worth the memory then
MOST = 2**16  # rows at a time, or units of 64 tokens: nobody asks for more
CALIBRATED = {  # families whose formula was checked against measurements or the real graph
    *("llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
    *("phi3", "olmo2", "smollm3", "granite"),
}
BAND = (0.97, 1.03)  # of allocated bytes, for families above
WIDE_BAND = (0.85, 1.2)
RESERVED = 0.02  # of allocated bytes: what the allocator usually holds beyond them
RESERVED_LEAST = 0.1 * GIB  # and at least: 11 of the 12 small runs of the grid hold more
RESERVED_AGAIN = 0.13  # of what is not there for the whole run, where layers are computed again
RESERVED_SCORES = 0.23  # the same where that is scores of all pairs of tokens most of all
RESERVED_ALIKE = 0.09  # and with dropout or bottlenecks, whose blocks are large and alike
FRAGMENTS = 1.05  # what the caching allocator holds beyond allocated bytes, at the fullest


@dataclass(frozen=True, eq=False)
class Need:
    """Bytes that a plan needs of a GPU: allocated by PyTorch low, likely, high; and for it all."""

    allocated: tuple[float, float, float]
    step: float
    """Allocated in a training step, likely: what is allocated before can be more."""
    reserved: float
    """What PyTorch holds of the card at the likely peak, gaps between its blocks included."""
    card: float
    """What nvidia-smi shows then: reserved, the CUDA context, and paged optimizer states."""
    context: float
    high: float
    """High allocated bytes, fragments and the CUDA context: what must be there to be safe."""


def need(plan: Plan, gpu: Gpu) -> Need:
    """The peak of a plan on this GPU."""
    peak = training_peak(plan)
    step = peak.size + gpu.workspace
    likely = max(step, loading_peak(plan))
    known = plan.architecture.exact and plan.architecture.model_type in CALIBRATED
    low, high = BAND if known else WIDE_BAND
    share = plan.again / plan.architecture.layers  # where blocks of many sizes come and go
    gaps = _gaps(plan, peak) * share * peak.passing
    with_copy = peak.with_copy + gpu.workspace + gaps
    reserved = max(likely + max(RESERVED * likely, RESERVED_LEAST, gaps), with_copy)
    safe = max(high * likely * FRAGMENTS, likely + RESERVED_LEAST) + gpu.context
    if safe <= gpu.memory:  # gaps are given back before the card is full
        reserved = min(reserved, gpu.memory - gpu.context)
    return Need(
        allocated=(low * likely, likely, high * likely),
        step=step,
        reserved=reserved,
        card=reserved + gpu.context + weights(plan).paged,
        context=gpu.context,
        high=safe,
    )


def _gaps(plan: Plan, peak: Peak) -> float:
    if any(part.name == "attention scores" for part in peak.parts):
        return RESERVED_SCORES
    return RESERVED_ALIKE if plan.dropout or plan.bottleneck else RESERVED_AGAIN


def verdict(plan: Plan, gpu: Gpu, reserved: float = 0.0) -> Verdict:
    """Whether the plan runs, with `reserved` bytes of the card taken by others."""
    found = need(plan, gpu)
    room = gpu.memory - reserved
    if found.high <= room:
        return "fits"
    return "tight" if found.allocated[1] + found.context <= room else "does not fit"


def candidates(plan: Plan, micro_batch: int | None = None, mode: Mode | None = None) -> list[Plan]:
    """The plan with each micro-batch that divides the batch, in each mode of checkpointing.

    What the user fixed stays as it is; only fused layers can offload.
    """
    sizes = [n for n in range(1, plan.batch + 1) if plan.batch % n == 0]
    sizes = sizes if micro_batch is None else [micro_batch]
    plans = [plan.checkpointed(x) for x in ((mode,) if mode else modes(plan))]
    return [replace(x, micro_batch=n) for n in sizes for x in plans]


def modes(plan: Plan) -> tuple[Mode, ...]:
    """The modes of checkpointing that the plan's layers can run in, the thriftiest last."""
    return ("none", "full", "offload") if plan.step.in_groups else ("none", "full")


def choose(
    plans: Iterable[Plan], gpu: Gpu, reserved: float = 0.0, lengths: Lengths | None = None
) -> Plan | None:
    """The fastest plan that fits, or None; of those that are about as fast the smallest peak.

    One that takes host memory as well is chosen only where no other fits. Where nothing fits
    without checkpointing, but could, as few layers as the card asks for are computed again. Speed
    is judged by `lengths`; the longest row, which must fit, is the plan's own length.
    """
    plans = list(plans)
    fitting = [plan for plan in plans if verdict(plan, gpu, reserved) == "fits"]
    if not fitting:
        return None
    fitting = [plan for plan in fitting if not plan.offload] or fitting
    rated = gpu if gpu.tflops else find_gpu("RTX 4090")  # only the order of speeds matters here

    def fastest(found: Iterable[Plan]) -> Plan:
        seconds = {x: step_seconds(x, rated, lengths or Lengths(x.length, x.length)) for x in found}
        least = min(seconds.values())
        fast = [plan for plan, each in seconds.items() if each <= ABOUT * least]
        return min(fast, key=lambda plan: training_peak(plan).size)

    best = fastest(fitting)
    if best.mode != "full" or not best.step.in_groups or all(x.checkpointing for x in plans):
        return best
    whole = {plan.micro_batch for plan in fitting if not plan.checkpointing}
    again = [plan for plan in fitting if plan.micro_batch not in whole]
    return fastest((*fitting, *(fewest_again(plan, gpu, reserved) for plan in again)))


def fewest_again(plan: Plan, gpu: Gpu, reserved: float = 0.0) -> Plan:
    """A checkpointed plan that fits, with as few layers checkpointed as fit too."""
    low, high = 0, plan.again  # which does not fit, and which does
    while high - low > 1:
        middle = (low + high) // 2
        fits = verdict(plan.checkpointed(middle), gpu, reserved) == "fits"
        low, high = (low, middle) if fits else (middle, high)
    return plan.checkpointed(high)


def smallest(plans: Iterable[Plan]) -> Plan:
    """The plan with the lowest peak: what to report and to change when none fits."""
    return min(plans, key=lambda plan: training_peak(plan).size)


def largest_micro_batch(plan: Plan, gpu: Gpu, reserved: float = 0.0) -> int:
    """The most rows of the plan's length that fit at a time, whatever the batch; 0 for none."""
    return _most(lambda n: replace(plan, micro_batch=n, batch=n), gpu, reserved)


def longest_row(plan: Plan, gpu: Gpu, reserved: float = 0.0) -> int:
    """The most tokens of a single row that fit, a multiple of 64; 0 for none."""
    one = replace(plan, micro_batch=1)
    return 64 * _most(lambda n: replace(one, length=64 * n), gpu, reserved)


def _most(plan_of: Callable[[int], Plan], gpu: Gpu, reserved: float) -> int:
    """The largest number below 2 * MOST that fits; the peak grows with it, almost in a line."""
    room = gpu.memory - reserved
    low, high, n = 0, 2 * MOST, 1
    tried: list[tuple[int, float]] = []
    while high - low > 1:
        tried.append((n, need(plan_of(n), gpu).high))
        low, high = (n, high) if tried[-1][1] <= room else (low, n)
        n = min(max(_following(tried, room, (low + high) // 2), low + 1), high - 1)
    return low


def _following(tried: list[tuple[int, float]], room: float, middle: int) -> int:
    """Where the line through the last two numbers tried meets the room; at times the middle."""
    if len(tried) == 1:
        return 2
    (n, size), (last_n, last) = tried[-2:]
    slope = (last - size) / (last_n - n)
    if slope <= 0 or len(tried) % 5 == 0:  # where it is no line, halving ends the search
        return middle
    return int(last_n + (room - last) / slope)


def gpus_that_fit(plan: Plan) -> list[Gpu]:
    """GPUs of the table that run the plan and that it fits, the cheapest first, owned ones last."""
    fitting = [gpu for gpu in GPUS if _runs(plan, gpu) and verdict(plan, gpu) == "fits"]
    return sorted(fitting, key=lambda gpu: (gpu.price_per_hour_usd or (99.0, 99.0), gpu.memory))


def _runs(plan: Plan, gpu: Gpu) -> bool:
    """Whether the GPU computes in what the plan's layers need: fused ones leave out float16."""
    stored = plan.architecture.quantization
    held_in_fp8 = stored is not None and stored.held and stored.method == "fp8"
    if (plan.quantization == "fp8" or held_in_fp8) and not gpu.has_fp8:
        return False  # of a checkpoint that is expanded there the plan says nothing
    return gpu.has_bfloat16 or not plan.step.in_groups
