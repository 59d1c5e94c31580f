"""The written weights, read again: changed where they should be, and nowhere else."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from peftcli.errors import NumericalError
from peftcli.merge.checkpoint import Stored, read_checkpoint
from peftcli.merge.plan import Item, Plan
from peftcli.merge.result import Proof

ELEMENTS = 1 << 22


def prove(plan: Plan, merged: Path) -> Proof:
    """Compare every tensor on disk with the base's; raises NumericalError where one differs that
    no update names, and for tensors that are missing or too many.
    """
    written = read_checkpoint(merged, allow_pickle=False)
    names = {item.name for item in plan.items}
    if names != set(written):
        raise NumericalError(
            f"{merged}: {len(names ^ set(written))} tensors too few or too many were written",
            "merge again; if it happens again, please report it",
        )
    kept, changed, lost = 0, 0, []
    for item in plan.items:
        equal = _equal(item, written[item.name])
        if not item.updates and not item.dequantized:
            if not equal:
                raise NumericalError(
                    f"{merged}: {item.name} differs from the base, and no update names it",
                    "check the disk, then merge again",
                )
            kept += 1
        elif not equal:
            changed += 1
        else:
            lost.append(item.name)
    return Proof(kept, changed, tuple(lost))


def _equal(item: Item, written: Stored) -> bool:
    """Whether the written tensor is the base's, rounded to its dtype."""
    if written.shape != item.source.shape:
        return False
    count = written.shape[0] if written.shape else 1
    step = max(1, ELEMENTS // max(1, math.prod(written.shape[1:])))
    for first in range(0, count, step):
        rows = slice(first, min(count, first + step))
        base, found = item.source.read(rows), written.read(rows)
        if not torch.equal(_bits(base.to(item.dtype)), _bits(found)):
            return False
    return True


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """As bytes, so that NaN equals itself."""
    return tensor.reshape(-1).view(torch.uint8)
