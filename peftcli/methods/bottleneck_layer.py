"""The module that PEFT puts around each site of a bottleneck adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from peftcli.methods.bottleneck_tuner import BottleneckConfig

NON_LINEARITIES: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "leaky_relu": nn.LeakyReLU,
}
NOT_MERGEABLE = (
    "A bottleneck adapter cannot be merged into the weights of the base model, because it is not "
    "linear. Serve the base model with the adapter loaded, or train LoRA instead."
)


class BottleneckLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]
    """A module of the base model with adapters on its output or, if parallel, beside it.

    Input and output are (..., width); of a module that returns a tuple the first element counts.
    """

    # What comes from BaseTunerLayer, which has no type stubs.
    base_layer: nn.Module
    active_adapters: list[str]
    get_base_layer: Callable[[], nn.Module]
    set_adapter: Callable[..., None]
    _move_adapter_to_device_of_base_layer: Callable[[str], None]
    _cast_input_dtype: Callable[[Tensor, Any], Tensor]

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("bottleneck_dropout", "bottleneck_activation", "bottleneck_config")

    def __init__(self, base_layer: nn.Module, hidden_size: int | None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.bottleneck_dropout = nn.ModuleDict()
        self.bottleneck_activation = nn.ModuleDict()
        self.bottleneck_config: dict[str, BottleneckConfig] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.in_features, self.out_features = _widths(self.get_base_layer(), hidden_size)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add an adapter to this layer; it starts as the identity unless the config says not to."""
        width = self.in_features if config.placement == "parallel" else self.out_features
        size = config.size(width)
        down = nn.Linear(width, size, bias=config.use_bias)
        up = nn.Linear(size, self.out_features, bias=config.use_bias)
        if config.init_weights:
            nn.init.zeros_(up.weight)
            if config.use_bias:
                nn.init.zeros_(down.bias)
                nn.init.zeros_(up.bias)
        self.bottleneck_down[adapter_name] = down
        self.bottleneck_up[adapter_name] = up
        self.bottleneck_dropout[adapter_name] = nn.Dropout(config.dropout)
        self.bottleneck_activation[adapter_name] = NON_LINEARITIES[config.non_linearity]()
        self.bottleneck_config[adapter_name] = config
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        if isinstance(result, tuple):
            return (self._adapt(x, result[0]), *result[1:])
        return self._adapt(x, result)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(NOT_MERGEABLE)

    def unmerge(self) -> None:
        raise ValueError(NOT_MERGEABLE)

    def _adapt(self, x: Tensor, output: Tensor) -> Tensor:
        """Add each active adapter; several see the same input, so their order does not matter."""
        adapted = output
        for name in self.active_adapters:
            if name in self.bottleneck_config:
                parallel = self.bottleneck_config[name].placement == "parallel"
                adapted = adapted + self._update(name, x if parallel else output)
        return adapted.to(output.dtype)

    def _update(self, name: str, features: Tensor) -> Tensor:
        down, up = self.bottleneck_down[name], self.bottleneck_up[name]
        features = self._cast_input_dtype(features, down.weight.dtype)
        hidden = self.bottleneck_activation[name](down(self.bottleneck_dropout[name](features)))
        update: Tensor = up(hidden) * self.bottleneck_config[name].scaling
        return update

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        # A whole feed-forward block has no weight of its own; its first part that has one decides.
        for module in base_layer.modules():
            device, dtype = super()._get_base_layer_device_and_dtype(module)
            if device is not None:
                return device, dtype
        return None, None


def _widths(base_layer: nn.Module, hidden_size: int | None) -> tuple[int, int]:
    """Return the features that a module takes and gives; a block of modules keeps the width."""
    if isinstance(base_layer, Conv1D):
        return base_layer.nx, base_layer.nf
    if hasattr(base_layer, "in_features") and hasattr(base_layer, "out_features"):
        widths: tuple[Any, Any] = base_layer.in_features, base_layer.out_features
        return widths
    is_block = any(True for _ in base_layer.children())
    if hidden_size is None or not is_block:
        raise ValueError(
            f"Target module {base_layer} is not supported. A bottleneck adapter sits on a linear "
            "layer or, in a transformers model, on a whole feed-forward block."
        )
    return hidden_size, hidden_size
