"""Bytes beside the weights of a fused step: 16-bit factors, and room for expanded weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from peftcli.architecture.config import Linear
from peftcli.estimate.parts import Part
from peftcli.estimate.plan import Plan
from peftcli.estimate.weights import storage

GROUPS = (  # linears that share an input; Phi-3 has one for all of a group
    ("q_proj", "k_proj", "v_proj", "qkv_proj"), ("o_proj",),
    ("gate_proj", "up_proj", "gate_up_proj"), ("down_proj",),
)  # fmt: skip
COLUMNS, STRIDE = 8, 64  # multiples that ranks and rows are rounded up to
CODED_AT_ONCE = 2**24  # values of a weight that are turned into fp8 at a time (peftcli/fp8.py)
CODING = 9  # bytes for each: in float32, scaled in float32, and the code


@dataclass(frozen=True)
class Matrix:
    """The weights of linears that share an input, with room for the factors of their update."""

    inputs: int
    outputs: int
    columns: int
    layers: int

    @property
    def stored(self) -> int:
        """Elements of the matrix, from which rows and columns of the update cannot be parted."""
        return (self.outputs + self.columns) * rounded(self.inputs + self.columns, STRIDE)

    @property
    def apart(self) -> int:
        """Elements of the factors where they lie beside a quantised base."""
        return self.columns * (self.inputs + self.outputs)

    def expanded(self, *, lean: bool) -> int:
        """Elements that are expanded at a time: `lean`, gate and up are one after the other."""
        one = replace(self, outputs=self.outputs // 2) if lean and self.layers == 2 else self
        return one.stored


def copies_of_factors(plan: Plan) -> float:
    """Bytes of the 16-bit factors, in the matrices of the weights or beside a quantised base."""
    if not plan.step.in_groups:
        return 0.0
    matrices = _matrices(plan)
    copies = plan.step.adapter_copies * plan.trainable
    if storage(plan) is None:
        return copies + 2.0 * sum(
            n * (x.stored - x.inputs * x.outputs) for x, n in matrices.items()
        )
    return copies + 2.0 * sum(n * x.apart for x, n in matrices.items())


def factors_and_room(plan: Plan) -> tuple[Part, ...]:
    """What `in_groups` adds at every moment."""
    if not plan.step.in_groups:
        return ()
    inside = storage(plan) is None
    text = "in the matrices of the weights, rows rounded up to 128 B" if inside else "2 B each"
    return Part("16-bit copies of the adapter", copies_of_factors(plan), text), *_room(plan)


def padding(plan: Plan) -> int:
    """Elements beside gate and up in a row of both, where the backward pass puts the update's."""
    if not plan.step.in_groups or plan.quantization == "fp8":
        return 0
    width = 2 * plan.architecture.intermediate
    ranks = sum(plan.rank_of(x) for x in plan.targets if x.suffix in GROUPS[2])
    return rounded(width + rounded(ranks, COLUMNS), STRIDE) - width


def turning_into_fp8(plan: Plan) -> float:
    """Bytes beside a base in 16 bits and its adapters, at the fullest moment of its turning.

    That is in the first layer; each weight leaves as much as its codes take.
    """
    most = spare = 0.0
    for group in GROUPS:
        members = [x for x in plan.architecture.linears if x.suffix in group and x.layers]
        matrix = _matrix(members, _ranks(plan, group, members[0].layers[0]))
        codes, factors = matrix.inputs * matrix.outputs, 2.0 * matrix.apart
        rows = max(1, CODED_AT_ONCE // matrix.inputs)
        at_once = min(rows * matrix.inputs, max(x.weights for x in members))
        most = max(most, spare + codes + factors + CODING * at_once)
        spare += factors - codes
    return most


def rounded(size: int, multiple: int) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple


def _room(plan: Plan) -> tuple[Part, ...]:
    if storage(plan) is None:
        return ()
    if plan.quantization == "fp8":
        room = max(x.inputs * x.outputs for x in _matrices(plan))
        text = f"{room:,} x 1 B: the largest matrix, by columns"
        return (Part("room for weights turned over", 1.0 * room, text),)
    room = max(x.expanded(lean=plan.checkpointing) for x in _matrices(plan))
    text = f"{room:,} x 2 B: the largest matrix"
    return (Part("room for expanded weights", 2.0 * room, text),)


def _matrices(plan: Plan) -> Counter[Matrix]:
    """How often each matrix occurs."""
    found: Counter[Matrix] = Counter()
    linears = {x.suffix: x for x in plan.architecture.linears if x.layers}
    for group in GROUPS:
        members = [linears[name] for name in group if name in linears]
        targets = [x for x in plan.targets if x.suffix in group]
        layers = members[0].layers
        if all(x.layers == layers for x in targets):
            ranks = sum(plan.rank_of(x) for x in targets)
            found[_matrix(members, ranks)] += len(layers)
            continue
        for layer in layers:
            found[_matrix(members, _ranks(plan, group, layer))] += 1
    return found


def _ranks(plan: Plan, group: tuple[str, ...], layer: int) -> int:
    """Ranks of all adapters of a group in that layer."""
    return sum(plan.rank_of(x) for x in plan.targets if x.suffix in group and layer in x.layers)


def _matrix(members: list[Linear], ranks: int) -> Matrix:
    outputs = sum(x.outputs for x in members)
    return Matrix(members[0].inputs, outputs, rounded(ranks, COLUMNS), len(members))
