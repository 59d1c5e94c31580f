"""Whether this card can multiply what the recipe's method holds the base in."""

from __future__ import annotations

import torch

from peftcli.errors import ResourceError
from peftcli.estimate.gpus import FP8_FROM
from peftcli.methods import AnyMethod
from peftcli.models import Device


def check_precision(method: AnyMethod, device: Device) -> None:
    """Raise ResourceError for a base in fp8 on a card without matrix units for it.

    A CPU is let through: it computes the same by plain functions, slowly.
    """
    if not method.frozen_in_fp8 or device.kind != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(0)
    if 10 * major + minor < FP8_FROM:
        raise ResourceError(
            f"method.quantization: fp8 needs compute capability {FP8_FROM / 10} (Ada, Hopper or "
            f"later), and {device.name} has {major}.{minor}",
            "remove it to train on a 16-bit base, or write `name: qlora` for one in 4 bits",
        )
