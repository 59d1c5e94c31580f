"""Bytes beside the weights of a fused step: 16-bit factors, and room for expanded weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from peftcli.estimate.parts import Part
from peftcli.estimate.plan import Plan
from peftcli.estimate.weights import storage

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
COLUMNS, STRIDE = 8, 64  # multiples that ranks and rows are rounded up to


@dataclass(frozen=True)
class Matrix:
    """The weights of linears that share an input, with room for the factors of their update."""

    inputs: int
    outputs: int
    columns: int

    @property
    def stored(self) -> int:
        """Elements of the matrix, from which rows and columns of the update cannot be parted."""
        stride = -(-(self.inputs + self.columns) // STRIDE) * STRIDE
        return (self.outputs + self.columns) * stride

    @property
    def apart(self) -> int:
        """Elements of the factors where they lie beside a quantised base."""
        return self.columns * (self.inputs + self.outputs)


def factors_and_room(plan: Plan) -> tuple[Part, ...]:
    """What `in_groups` adds at every moment."""
    if not plan.step.in_groups:
        return ()
    matrices = _matrices(plan)
    if storage(plan) is None:
        more = sum(n * (x.stored - x.inputs * x.outputs) for x, n in matrices.items())
        text = "in the matrices of the weights, rows rounded up to 128 B"
        return (Part("16-bit copies of the adapter", 2.0 * more + _copies(plan), text),)
    factors = sum(n * x.apart for x, n in matrices.items())
    copies = Part("16-bit copies of the adapter", 2.0 * factors + _copies(plan), "2 B each")
    if plan.quantization == "fp8":
        room = max(x.inputs * x.outputs for x in matrices)
        text = f"{room:,} x 1 B: the largest matrix, by columns"
        return copies, Part("room for weights turned over", 1.0 * room, text)
    room = max(x.stored for x in matrices)
    text = f"{room:,} x 2 B: the largest matrix"
    return copies, Part("room for expanded weights", 2.0 * room, text)


def _copies(plan: Plan) -> float:
    return plan.step.adapter_copies * plan.trainable


def _matrices(plan: Plan) -> Counter[Matrix]:
    """How often each matrix occurs."""
    found: Counter[Matrix] = Counter()
    linears = {x.suffix: x for x in plan.architecture.linears if x.layers}
    for group in GROUPS:
        members = [linears[name] for name in group]
        targets = [x for x in plan.targets if x.suffix in group]
        for layer in members[0].layers:
            ranks = plan.rank * sum(layer in x.layers for x in targets)
            columns = -(-ranks // COLUMNS) * COLUMNS
            outputs = sum(x.outputs for x in members)
            found[Matrix(members[0].inputs, outputs, columns)] += 1
    return found
