"""Which form of the base the update is added to, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peftcli.errors import UsageError
from peftcli.merge.identity import trained_on_stored
from peftcli.merge.options import BaseKind
from peftcli.merge.quantized import Quantization, assumed_quantization, quantization_of
from peftcli.merge.source import AdapterSource


@dataclass(frozen=True)
class Choice:
    """The form, the reason in words, and how the base was held in training."""

    kind: BaseKind
    why: str
    quantization: Quantization | None


def choose_base(sources: Sequence[AdapterSource], wanted: BaseKind | None) -> Choice:
    """The base as it was in training, or as the user wants it.

    Raises UsageError when adapters of different bases meet, or for a dequantised base of a run
    that was not trained on one.
    """
    if wanted != "dequantized" and any(trained_on_stored(source) for source in sources):
        why = "named as the one that the quantised checkpoint of the training was made from"
        return Choice("original", why, None)
    held = quantization_of(sources[0])
    for other in sources[1:]:
        their = quantization_of(other)
        if wanted is None and _bits(their) != _bits(held):
            raise UsageError(
                f"{sources[0].name} was trained on {_bits(held)} weights, {other.name} on "
                f"{_bits(their)} ones",
                "say which base to use: --base dequantized or --base original",
            )
    if held is not None:
        if wanted == "original":
            why = f"as asked, although the adapter was trained on {held.bits} ones"
            return Choice("original", why, held)
        why = f"the adapter was trained on {held.kind} weights, so it belongs to those"
        return Choice("dequantized", why, held)
    if wanted == "dequantized":
        if any(source.manifest is not None for source in sources):
            raise UsageError(
                "--base dequantized: the run was trained on 16-bit weights",
                "leave the option away",
            )
        why = "as asked; how it was trained is not recorded, so NF4 with double quantisation"
        return Choice("dequantized", why, assumed_quantization())
    if sources[0].manifest is None:
        return Choice("original", "nothing says that the adapter was trained on 4-bit ones", None)
    return Choice("original", "the adapter was trained on them", None)


def _bits(held: Quantization | None) -> str:
    return "16-bit" if held is None else held.bits
