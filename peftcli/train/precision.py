"""Whether this card can compute in the precision that the recipe needs."""

from __future__ import annotations

import torch

from peftcli.architecture.shapes import Architecture
from peftcli.errors import ResourceError
from peftcli.estimate.gpus import FP8_FROM
from peftcli.models import Device
from peftcli.recipe.schema import Recipe
from peftcli.train.kernels import cannot_checkpoint


def check_precision(recipe: Recipe, device: Device) -> None:
    """Raise ResourceError for a base in fp8 on a card without matrix units for it.

    A CPU is let through: it computes the same by plain functions, slowly. Raises UsageError for a
    way of checkpointing that only fused layers have, where the run computes in float16.
    """
    mode = recipe.training.checkpointing
    if recipe.training.asks_for_fused_layers and device.dtype == "float16":
        lowest = mode if isinstance(mode, int) else None
        raise cannot_checkpoint(lowest, f"and {device.name} computes in float16, not bfloat16")
    if not recipe.method.frozen_in_fp8 or device.kind != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(0)
    if 10 * major + minor < FP8_FROM:
        raise ResourceError(
            f"method.quantization: fp8 needs compute capability {FP8_FROM / 10} (Ada, Hopper or "
            f"later), and {device.name} has {major}.{minor}",
            "remove it to train on a 16-bit base, or write `name: qlora` for one in 4 bits",
        )


def misread_on_a_cpu(recipe: Recipe, device: Device, architecture: Architecture) -> str | None:
    """What to warn of where bitsandbytes 0.50.2 expands 4-bit weights with scales of other blocks.

    Its CPU code does so where a row is no whole number of blocks, unless rows are odd.
    """
    held = recipe.method.footprint(architecture).quantization
    if device.kind != "cpu" or held not in ("nf4", "fp4"):
        return None
    linears = [x for x in architecture.linears if x.kind != "head"]
    misread = next((x for x in linears if x.inputs % 64 and x.inputs % 2 == 0), None)
    if misread is None:
        return None
    return (
        f"{misread.suffix} has {misread.inputs} inputs, no multiple of 64: on a CPU bitsandbytes "
        "expands such 4-bit weights wrongly, and `merge` will refuse; train on a GPU, or by `lora`"
    )
