"""A recipe -> the plain plan that the formulas work on."""

from __future__ import annotations

from dataclasses import replace

from peftcli.architecture.config import Architecture
from peftcli.estimate.gpus import Gpu
from peftcli.estimate.plan import Attention, Plan
from peftcli.estimate.step_model import (
    FUSED_BOTTLENECK,
    FUSED_FP8,
    FUSED_LORA,
    TRL_BOTTLENECK,
    TRL_DORA,
    TRL_DORA_QUANTIZED,
    TRL_FULL,
    TRL_FULL_FLOAT32,
    TRL_LORA,
    TRL_LORA_DROPOUT,
    TRL_LORA_FLOAT32,
    TRL_QLORA,
    TRL_QLORA_DROPOUT,
    StepModel,
)
from peftcli.estimate.weights import storage
from peftcli.estimate.widths import WRITERS
from peftcli.recipe.checks import FUSED, rows_apart
from peftcli.recipe.schema import Recipe

PACKED: Attention = "masked"  # rows of a sequence are kept apart by a block-diagonal mask
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def plan_of(
    recipe: Recipe, architecture: Architecture, gpu: Gpu, *, length: int, packing: bool
) -> Plan:
    """The recipe's plan for one row at a time, without checkpointing."""
    method = recipe.method
    dtype = recipe.model.dtype
    if dtype == "auto":
        dtype = "bfloat16" if gpu.has_bfloat16 else "float16"
    footprint = method.footprint(architecture)
    plan = Plan(
        architecture=as_loaded(architecture, gpu),
        trainable=method.trainable_parameters(architecture),
        targets=footprint.targets,
        rank=footprint.rank,
        ranks=footprint.ranks,
        bottleneck=footprint.bottleneck,
        sites=footprint.sites,
        layers=footprint.layers,
        trains_base=footprint.trains_base,
        trains_head=footprint.trains_head and not footprint.trains_base,
        trains_embeddings=footprint.trains_embeddings,
        dropout=footprint.dropout,
        magnitudes=footprint.magnitudes,
        adapter_bytes=4,  # trained values are float32 whatever the base is
        base_bytes=DTYPE_BYTES[method.weights_dtype(dtype)],
        quantization=footprint.quantization,
        double_quantization=footprint.double_quantization,
        optimizer=recipe.optimizer,
        flat=recipe.optimizer.endswith(("8bit", "32bit")),  # bitsandbytes' own
        batch=recipe.training.batch_size,
        length=length,
        attention=attention_of(
            recipe, architecture, length, packing, flash=gpu.has_flash and dtype != "float32"
        ),
        padded=not packing and not rows_apart(recipe, architecture),
    )
    fused = footprint.fusible and runs_fused(recipe, architecture, dtype)
    return replace(plan, step=fused_step_of(plan) if fused else step_of(plan))


def as_loaded(architecture: Architecture, gpu: Gpu) -> Architecture:
    """The model as transformers holds it: fp8 becomes 16 bits where the card cannot multiply it."""
    stored = architecture.quantization
    if stored is None or stored.method != "fp8" or gpu.has_fp8:
        return architecture
    return replace(architecture, quantization=replace(stored, bits=None))


def runs_fused(recipe: Recipe, architecture: Architecture, dtype: str) -> bool:
    """Whether the layers run on the fused functions, as far as the method lets them."""
    return (
        recipe.training.kernels == "auto"
        and dtype == "bfloat16"
        and architecture.model_type in FUSED
        and architecture.quantization is None
        and rows_apart(recipe, architecture)
    )


def fused_step_of(plan: Plan) -> StepModel:
    """The step model of the fused functions."""
    if plan.quantization == "fp8":
        return FUSED_FP8
    return FUSED_BOTTLENECK if plan.bottleneck else FUSED_LORA


def step_of(plan: Plan) -> StepModel:
    """The step model of TRL for the method and base of a plan."""
    if plan.trains_base:
        return TRL_FULL_FLOAT32 if plan.base_bytes == 4 else TRL_FULL
    if plan.bottleneck:
        return TRL_BOTTLENECK
    few = storage(plan) is not None
    reached = any(x.kind == "mlp" or (few and x.suffix in WRITERS) for x in plan.targets)
    if plan.magnitudes and plan.base_bytes < 4 and reached:
        return TRL_DORA_QUANTIZED if few else TRL_DORA
    if few:
        step = TRL_QLORA_DROPOUT if plan.dropout else TRL_QLORA
    elif plan.base_bytes == 4:
        step = TRL_LORA_FLOAT32
    else:
        step = TRL_LORA_DROPOUT if plan.dropout else TRL_LORA
    if not plan.magnitudes:
        return step
    own = {name: getattr(TRL_DORA, name) for name in ("adapted_traffic", "weight_traffic")}
    return replace(step, **own)


def attention_of(
    recipe: Recipe, architecture: Architecture, length: int, packing: bool, *, flash: bool
) -> Attention:
    """The kernel for rows of this length; `flash` if that of flash attention runs here."""
    wanted = recipe.model.attention
    if wanted == "eager" or (architecture.attention_softcap and wanted != "flash_attention_2"):
        return "eager"
    if wanted == "flash_attention_2":
        return "flash"
    apart = rows_apart(recipe, architecture)
    if apart and flash:  # by the kernel itself, windows included
        return "flash"
    window = architecture.sliding_window
    if window is not None and length > window:
        return "masked"
    if packing and not apart:
        return PACKED
    if flash:
        return "flash"
    shares = architecture.kv_heads < architecture.heads
    return "eager" if shares and not apart else "efficient"  # transformers repeats no keys then
