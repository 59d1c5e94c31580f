"""What an adapter does to one parameter: one function for each method.

An update works on a region of the parameter, so that no parameter is ever in memory as a whole
unless the method's arithmetic needs all of it. The order of operations is that of PEFT's own merge,
and the factors are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Region = tuple[int | slice, ...]
"""Indices of a parameter's leading dimensions: an expert and its rows, or rows."""

EVERYTHING: Region = (slice(None),)


@dataclass(frozen=True)
class Update:
    """The change of one parameter; exactly one of `delta` and `replace` is given."""

    delta: Callable[[Region], Tensor] | None = None
    """Region -> what is added to the parameter there."""
    replace: Callable[[Tensor, Region, Tensor], Tensor] | None = None
    """(values so far, region, the base's values) -> the new values."""
    whole: bool = False
    """Whether `replace` must see the whole parameter at once."""
    rows: int | None = None
    """How many rows the result has, where it is not the parameter's own number."""
    least: int = 0
    """How many rows the parameter must have."""
    of_base: bool = False
    """Whether the result still counts as the base's values, for the updates after it."""
    weighted: bool = False
    """Whether `scale` holds the adapter's weight already."""
    content: tuple[Tensor, ...] = ()
    """What the update is made of: two updates of equal content and scale are the same."""
    scale: float = 1.0

    def apply(self, values: Tensor, region: Region, base: Tensor) -> Tensor:
        """The new values of a region."""
        if self.replace is not None:
            return self.replace(values, region, base)
        change = self.change(values, region).to(values.dtype)
        # A sum in place spares a pass over memory.
        return change.add_(values) if change.is_contiguous() else values + change

    def change(self, values: Tensor, region: Region) -> Tensor:
        """What an additive update adds to `values` in a region, in float32."""
        if self.delta is None:
            raise TypeError("only additive updates have a change of their own")
        change = self.delta(region).to(values.device)
        if change.shape == values.shape:
            return change
        # The adapter was trained on an embedding cut down to the tokenizer: the rest stays.
        padded = torch.zeros(values.shape, dtype=change.dtype, device=values.device)
        padded[: change.shape[0]] = change
        return padded

    def same_as(self, other: Update) -> bool:
        """Whether both do the same, for parameters that are tied to each other."""
        return (
            self.scale == other.scale
            and bool(self.content)
            and len(self.content) == len(other.content)
            and all(map(torch.equal, self.content, other.content))
        )


def lora(a: Tensor, b: Tensor, scale: float, *, transposed: bool) -> Update:
    """LoRA on a linear module: scale * B A, transposed for weights stored as (inputs, outputs).

    `a` is (rank, inputs), `b` is (outputs, rank). Hu et al., 2021, arXiv 2106.09685.
    """

    def delta(region: Region) -> Tensor:
        if transposed:
            return (b @ a[:, region[0]]).T.mul_(scale)
        return (b[region[0]] @ a).mul_(scale)

    return Update(delta=delta, content=(a, b), scale=scale, weighted=True)


def lora_embedding(a: Tensor, b: Tensor, scale: float) -> Update:
    """LoRA on an embedding: `a` is (rank, tokens), `b` is (features, rank)."""

    def delta(region: Region) -> Tensor:
        return (b @ a[:, region[0]]).T * scale

    # As a linear module's factors, so that a tied output head compares equal.
    return Update(delta=delta, content=(b.T, a.T), scale=scale, weighted=True)


def lora_experts(a: Tensor, b: Tensor, scale: float, *, experts: int, inputs_first: bool) -> Update:
    """LoRA on a fused parameter of experts: `a` is (experts * rank, inputs), `b` is
    (outputs, rank * experts), and the parameter is (experts, outputs, inputs), or
    (experts, inputs, outputs) with `inputs_first`.
    """
    a = a.reshape(experts, -1, a.shape[-1])
    b = b.reshape(b.shape[0], -1, experts)

    def one(expert: int, rows: slice) -> Tensor:
        if inputs_first:
            return (b[:, :, expert] @ a[expert][:, rows]).T * scale
        return (b[rows, :, expert] @ a[expert]) * scale

    def delta(region: Region) -> Tensor:
        first, rows = region[0], region[1] if len(region) > 1 else slice(None)
        if isinstance(first, int):
            return one(first, _rows(rows))
        return torch.stack([one(e, _rows(rows)) for e in range(experts)[first]])

    return Update(delta=delta, content=(a, b), scale=scale, weighted=True)


def lora_bias(bias: Tensor, scale: float) -> Update:
    """The bias of LoRA's B, added to the module's own."""

    def delta(region: Region) -> Tensor:
        return bias[region[0]] * scale

    return Update(delta=delta, content=(bias,), scale=scale, weighted=True)


def dora(a: Tensor, b: Tensor, magnitude: Tensor, scale: float, *, transposed: bool) -> Update:
    """DoRA on a linear module: magnitude * (W + scale B A) / its norm over the inputs.

    `magnitude` is (outputs,). Liu et al., 2024, arXiv 2402.09353.
    """
    plain = lora(a, b, scale, transposed=transposed)

    def replace(values: Tensor, region: Region, base: Tensor) -> Tensor:
        change = plain.change(values, region)
        changed, own = values + change, base + change
        norm = torch.linalg.norm(own.T if transposed else own, dim=1).to(own.dtype)
        rows = slice(None) if transposed else region[0]
        factor = (magnitude.to(values.device)[rows] / norm).view(-1, 1)
        new: Tensor = (factor.T if transposed else factor) * changed
        return new

    content = (*plain.content, magnitude)
    return Update(replace=replace, whole=transposed, content=content, scale=scale, weighted=True)


def dora_embedding(a: Tensor, b: Tensor, magnitude: Tensor, scale: float) -> Update:
    """DoRA on an embedding, whose norms run over all tokens; `magnitude` is (features,)."""
    plain = lora_embedding(a, b, scale)

    def replace(values: Tensor, region: Region, base: Tensor) -> Tensor:
        change = plain.change(values, region)
        changed, own = values + change, base + change
        norm = torch.linalg.norm(own.T, dim=1).to(own.dtype)
        new: Tensor = (magnitude.to(values.device) / norm).view(1, -1) * changed
        return new

    content = (*plain.content, magnitude)
    return Update(replace=replace, whole=True, content=content, scale=scale, weighted=True)


def ia3(factors: Tensor, *, on_inputs: bool, transposed: bool) -> Update:
    """IA3: each input or each output of a linear module times a factor.

    Liu et al., 2022, arXiv 2205.05638.
    """
    vector = factors.reshape(-1)
    by_column = on_inputs is not transposed

    def replace(values: Tensor, region: Region, base: Tensor) -> Tensor:
        factor = vector.to(values.device)
        if values.dim() == 1 or not by_column:
            factor = factor[region[0]]
        return values * (factor.view(-1, 1) if values.dim() > 1 and not by_column else factor)

    return Update(replace=replace, content=(factors,))


def whole_value(value: Tensor, *, of_base: bool = False) -> Update:
    """A parameter that was trained whole: `modules_to_save`, biases, grown embeddings.

    Rows of the parameter that `value` does not have stay: padded vocabularies never shrink.
    """

    def replace(values: Tensor, region: Region, base: Tensor) -> Tensor:
        new = value[region].to(values.device, values.dtype)
        if new.dim() == 0 or new.shape[0] >= values.shape[0]:
            return new
        return torch.cat([new, values[new.shape[0] :]])

    rows = value.shape[0] if value.dim() else None
    return Update(replace=replace, rows=rows, of_base=of_base, content=(value,))


def token_rows(value: Tensor, tokens: list[int]) -> Update:
    """Some rows of an embedding: `value` is (len(tokens), features)."""
    places = {token: place for place, token in enumerate(tokens)}

    def replace(values: Tensor, region: Region, base: Tensor) -> Tensor:
        first = _rows(region[0]).start or 0
        here = [token for token in tokens if first <= token < first + values.shape[0]]
        if not here:
            return values
        at = torch.tensor([token - first for token in here], device=values.device)
        source = value[[places[token] for token in here]].to(values.device, values.dtype)
        return values.index_copy(0, at, source)

    least = max(tokens, default=-1) + 1
    return Update(replace=replace, least=least, content=(value, torch.tensor(tokens)))


def run_chain(chain: Sequence[Update], values: Tensor, region: Region) -> Tensor:
    """The values of a region after each update in turn."""
    base = values
    for update in chain:
        values = update.apply(values, region, base)
        base = values if update.of_base else base
    return values


def _rows(rows: int | slice) -> slice:
    return rows if isinstance(rows, slice) else slice(rows, rows + 1)
