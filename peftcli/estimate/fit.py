"""What fits a GPU, the fastest setting that does, and the cheapest changes when nothing does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from peftcli.estimate.duration import Lengths, step_seconds
from peftcli.estimate.gpus import GPUS, Gpu, find_gpu
from peftcli.estimate.memory import loading_peak, training_peak
from peftcli.estimate.plan import Plan
from peftcli.estimate.step_model import TRL_LORA, TRL_QLORA

Verdict = Literal["fits", "tight", "does not fit"]
CALIBRATED = {  # families whose formula was checked against measurements or the real graph
    *("llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
    *("phi3", "olmo2", "smollm3", "granite"),
}
BAND = (0.97, 1.03)  # of allocated bytes, for families above
WIDE_BAND = (0.85, 1.2)
FRAGMENTS = 1.05  # what the caching allocator holds beyond allocated bytes, at the fullest


@dataclass(frozen=True)
class Need:
    """Bytes that a plan needs of a GPU: allocated by PyTorch low, likely, high; and for it all."""

    allocated: tuple[float, float, float]
    context: float
    high: float
    """High allocated bytes, fragments and the CUDA context: what must be there to be safe."""


def need(plan: Plan, gpu: Gpu) -> Need:
    """The peak of a plan on this GPU."""
    likely = max(training_peak(plan).size + gpu.workspaces, loading_peak(plan))
    known = plan.architecture.exact and plan.architecture.model_type in CALIBRATED
    low, high = BAND if known else WIDE_BAND
    return Need(
        allocated=(low * likely, likely, high * likely),
        context=gpu.context,
        high=high * likely * FRAGMENTS + gpu.context,
    )


def verdict(plan: Plan, gpu: Gpu, reserved: float = 0.0) -> Verdict:
    """Whether the plan runs, with `reserved` bytes of the card taken by others."""
    found = need(plan, gpu)
    room = gpu.memory - reserved
    if found.high <= room:
        return "fits"
    return "tight" if found.allocated[1] + found.context <= room else "does not fit"


def candidates(
    plan: Plan, micro_batch: int | None = None, checkpointing: bool | None = None
) -> list[Plan]:
    """The plan with each micro-batch that divides the batch, and with and without checkpointing.

    What the user fixed stays as it is.
    """
    sizes = [n for n in range(1, plan.batch + 1) if plan.batch % n == 0]
    sizes = sizes if micro_batch is None else [micro_batch]
    modes = (False, True) if checkpointing is None else (checkpointing,)
    return [replace(plan, micro_batch=n, checkpointing=mode) for n in sizes for mode in modes]


def choose(
    plans: Iterable[Plan], gpu: Gpu, reserved: float = 0.0, lengths: Lengths | None = None
) -> Plan | None:
    """The fastest plan that fits, or None; equally fast ones by the smaller peak.

    Speed is judged by `lengths`; the longest row, which must fit, is the plan's own length.
    """
    fitting = [plan for plan in plans if verdict(plan, gpu, reserved) == "fits"]
    if not fitting:
        return None
    rated = gpu if gpu.tflops else find_gpu("RTX 4090")  # only the order of speeds matters here

    def slowness(plan: Plan) -> tuple[float, float]:
        seconds = step_seconds(plan, rated, lengths or Lengths(plan.length, plan.length))
        return round(seconds, 3), training_peak(plan).size

    return min(fitting, key=slowness)


def smallest(plans: Iterable[Plan]) -> Plan:
    """The plan with the lowest peak: what to report and to change when none fits."""
    return min(plans, key=lambda plan: training_peak(plan).size)


@dataclass(frozen=True)
class Change:
    """One change of a recipe, what it saves, and whether it is enough on its own."""

    line: str
    consequence: str
    saves: float
    fits: bool
    plan: Plan


def changes(plan: Plan, gpu: Gpu, reserved: float = 0.0, most: int = 3) -> list[Change]:
    """The cheapest changes that save memory, those that suffice alone first."""
    before = training_peak(plan).size
    found = []
    for offer in OFFERS:
        changed = offer(plan, gpu, reserved)
        if changed is None:
            continue
        line, consequence, other = changed
        saves = before - training_peak(other).size
        if saves > 0.01 * before:
            fits = verdict(other, gpu, reserved) == "fits"
            found.append(Change(line, consequence, saves, fits, other))
    found.sort(key=lambda change: not change.fits)  # stable: cheap ones stay first
    return found[:most]


Offer = tuple[str, str, Plan]


def _micro_batch(plan: Plan, gpu: Gpu, reserved: float) -> Offer | None:
    if plan.micro_batch == 1:
        return None
    other = replace(plan, micro_batch=1)
    return "training.micro_batch_size: 1", "the same result, fewer rows at a time", other


def _checkpointing(plan: Plan, gpu: Gpu, reserved: float) -> Offer | None:
    if plan.checkpointing:
        return None
    other = replace(plan, checkpointing=True)
    return "training.checkpointing: full", "the same result, about 40 % slower", other


def _optimizer(plan: Plan, gpu: Gpu, reserved: float) -> Offer | None:
    if "8bit" in plan.optimizer:
        return None
    other = replace(plan, optimizer="paged_adamw_8bit")
    return "training.optimizer: paged_adamw_8bit", "optimizer states in 8 bits", other


def _full_to_lora(plan: Plan, gpu: Gpu, reserved: float) -> Offer | None:
    if not plan.trains_base:
        return None
    targets = tuple(x for x in plan.architecture.linears if x.kind in ("attention", "mlp"))
    other = replace(
        plan,
        trainable=sum(x.count * 16 * (x.inputs + x.outputs) for x in targets),
        targets=targets,
        rank=16,
        trains_base=False,
        base_bytes=2,
        adapter_bytes=4,
        step=TRL_LORA,
    )
    return "method: lora", "trains 16 directions of each weight instead of all of it", other


def _four_bits(plan: Plan, gpu: Gpu, reserved: float) -> Offer | None:
    if plan.quantization or plan.trains_base:
        return None
    step = TRL_QLORA if plan.targets else plan.step
    other = replace(plan, quantization="nf4", step=step, optimizer="paged_adamw_32bit")
    line = "method.quantization: nf4" if plan.bottleneck else "method.name: qlora"
    return line, "the base in 4 bits: slightly less exact, a little slower", other


def _shorter(plan: Plan, gpu: Gpu, reserved: float) -> Offer | None:
    low, high = 0, plan.length // 64
    while low < high:  # the longest multiple of 64 that fits
        middle = (low + high + 1) // 2
        fits = verdict(replace(plan, length=64 * middle), gpu, reserved) == "fits"
        low, high = (middle, high) if fits else (low, middle - 1)
    length = 64 * low or plan.length // 2
    if length < 64 or length >= plan.length:
        return None
    other = replace(plan, length=length)
    return f"data.max_length: {length}", "longer rows are cut or dropped", other


def _rank(plan: Plan, gpu: Gpu, reserved: float) -> Offer | None:
    if plan.rank < 16:
        return None
    other = replace(plan, rank=plan.rank // 2, trainable=plan.trainable // 2)
    return f"method.rank: {plan.rank // 2}", "can learn less", other


OFFERS: tuple[Callable[[Plan, Gpu, float], Offer | None], ...] = (
    _micro_batch,
    _checkpointing,
    _optimizer,
    _four_bits,
    _full_to_lora,
    _rank,
    _shorter,
)


def gpus_that_fit(plan: Plan) -> list[Gpu]:
    """GPUs of the table that the plan fits, the cheapest first, owned ones last."""
    fitting = [gpu for gpu in GPUS if verdict(plan, gpu) == "fits"]
    return sorted(fitting, key=lambda gpu: (gpu.price_per_hour_usd or (99.0, 99.0), gpu.memory))
