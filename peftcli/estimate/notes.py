"""What the reader of an estimate must know to trust or mistrust its figures."""

from __future__ import annotations

from collections.abc import Iterator

from peftcli.architecture.config import Architecture
from peftcli.architecture.shapes import CheckpointQuantization
from peftcli.estimate.fit import CALIBRATED
from peftcli.estimate.gpus import GIB, Gpu
from peftcli.estimate.memory import host_bytes
from peftcli.estimate.plan import Plan
from peftcli.estimate.result import Rows
from peftcli.estimate.weights import storage
from peftcli.recipe.checks import ONE_AT_A_TIME, one_at_a_time
from peftcli.recipe.schema import Recipe


def notes_on(recipe: Recipe, plan: Plan, rows: Rows, gpu: Gpu) -> Iterator[str]:
    """One sentence for each doubt."""
    architecture = plan.architecture
    if not architecture.exact:
        yield f"{architecture.model_type} is not known: sizes are those of a plain decoder"
    if architecture.model_type not in CALIBRATED:
        yield "the memory of this family was never checked: the band is wide"
    yield from _mixture(plan)
    if architecture.quantization is not None:
        yield _checkpoint(architecture.quantization, chosen=recipe.method)
    if not gpu.tflops:
        yield "of this card only the memory is known: a name of the table tells time and cost too"
    if why := refusal(recipe, architecture, gpu):
        yield why
    if recipe.training.checkpointing == architecture.layers:
        yield f"`checkpointing: {architecture.layers}` is `full`: the model has no more layers"
    if one_at_a_time(recipe, architecture) and recipe.training.micro_batch_size != 1:
        yield ONE_AT_A_TIME
    if plan.magnitudes:
        yield "DoRA multiplies each update out in the shape of its weight: slow, and counted"
    if plan.lowest is not None:
        whole = plan.architecture.layers
        yield f"of the {whole} layers the {plan.lowest} lowest are computed again to go backward"
    if plan.offload:
        yield f"{host_bytes(plan) / GIB:.1f} GiB of host memory for the layers' inputs"
    if rows.how:
        yield rows.how
    elif rows.longest is None:
        why = f" ({rows.unread})" if rows.unread else ""
        text = f"the rows were not read{why}: every row is taken as long as data.max_length"
        known = recipe.training.max_steps is not None
        yield text if known else f"{text}; --set training.max_steps=1000 tells time and cost"


def refusal(recipe: Recipe, architecture: Architecture, gpu: Gpu) -> str:
    """Why `train` refuses a recipe on a card, whatever it holds; empty where it does not."""
    if recipe.method.frozen_in_fp8 and not gpu.has_fp8:
        return f"{gpu.name} does not multiply in fp8: `train` refuses it there"
    if gpu.has_bfloat16 or not recipe.training.asks_for_fused_layers:
        return ""
    if not recipe.method.footprint(architecture).fusible:  # which is shown with `full` anywhere
        return ""
    mode = recipe.training.checkpointing
    return (
        f"{gpu.name} computes in float16: `train` refuses `checkpointing: {mode}` there, and this "
        "is of `full`"
    )


def _mixture(plan: Plan) -> Iterator[str]:
    experts = plan.architecture.experts
    if not experts:
        return
    size = sum(x.parameters() for x in experts)
    form = storage(plan)
    if form is not None and not form.experts:
        held = size * plan.base_bytes / GIB
        yield f"experts stay in 16 bits: bitsandbytes leaves {held:.1f} GiB of them alone"
    if plan.targets:
        names = ", ".join(dict.fromkeys(target.suffix for target in plan.targets))
        yield (
            f"LoRA reaches {names}; the {experts[0].count} experts of a layer are fused "
            f"parameters, {size:,} in all, which it leaves alone"
        )


def _checkpoint(stored: CheckpointQuantization, *, chosen: object) -> str:
    asked = getattr(chosen, "quantization", None)
    if not stored.held:
        how = f"in {stored.method}" if stored.method != "unknown" else "quantised, nobody says how"
        counted = f"in {asked}, as the recipe says" if asked else "in 16 bits"
        return f"the checkpoint is stored {how}; its weights are counted {counted}"
    bits = f"{stored.bits} bits"
    text = f"the checkpoint is stored in {stored.method}, {bits}, and is held so"
    return f"{text}; method.quantization: {asked} changes nothing" if asked else text
