"""Whether this card can multiply what the recipe's method holds the base in."""

from __future__ import annotations

import torch

from peftcli.errors import ResourceError
from peftcli.methods import AnyMethod
from peftcli.models import Device

FP8_FROM = (8, 9)  # compute capability of Ada; Hopper and later are above it


def check_precision(method: AnyMethod, device: Device) -> None:
    """Raise ResourceError for a base in fp8 on a card without matrix units for it.

    A CPU is let through: it computes the same by plain functions, slowly.
    """
    if not method.frozen_in_fp8 or device.kind != "cuda":
        return
    found = torch.cuda.get_device_capability(0)
    if found < FP8_FROM:
        raise ResourceError(
            f"method.quantization: fp8 needs compute capability {FP8_FROM[0]}.{FP8_FROM[1]} (Ada, "
            f"Hopper or later), and {device.name} has {found[0]}.{found[1]}",
            "remove it to train on a 16-bit base, or write `name: qlora` for one in 4 bits",
        )
