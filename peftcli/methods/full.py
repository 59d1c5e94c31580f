"""Full fine-tuning: every weight of the base is trained. For small models and comparisons."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from peftcli.methods.base import Footprint, Method, Thrift

if TYPE_CHECKING:
    from peftcli.architecture.config import Architecture


class Full(Method):
    """Train all parameters."""

    summary: ClassVar[str] = "every weight of the base; for small models and comparisons"
    default_learning_rate: ClassVar[float] = 1e-5
    usual_learning_rates: ClassVar[tuple[float, float]] = (1e-6, 1e-4)
    mergeable: ClassVar[bool] = False
    saves_adapter: ClassVar[bool] = False

    name: Literal["full"] = "full"

    def peft_config(self, architecture: Architecture) -> None:
        return None

    def weights_dtype(self, dtype: str) -> str:
        return "float32"  # small updates vanish in 16-bit weights

    def trainable_parameters(self, architecture: Architecture) -> int:
        return architecture.parameters()

    def footprint(self, architecture: Architecture) -> Footprint:
        return Footprint(trains_base=True, trains_head=True)

    def thriftier(self) -> list[Thrift]:
        text = "trains 16 directions of each weight instead of all of it"
        return [Thrift({"name": "lora"}, text)]
