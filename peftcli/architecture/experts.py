"""The expert layers of a mixture: which layers have them, and what stands in each."""

from __future__ import annotations

from peftcli.architecture.families import Family
from peftcli.architecture.keys import Keys
from peftcli.architecture.layout import Mixture
from peftcli.architecture.shapes import Experts, Linear, Tensor

MOST_EXPERTS = 100_000
ACTIVE = ("num_experts_per_tok", "experts_per_token", "num_experts_per_token", "moe_k")


def sparse_layers(keys: Keys, mixture: Mixture | None, layers: int) -> tuple[int, ...]:
    """Indices of the layers with experts; the rules of Qwen, DeepSeek and Llama 4 together."""
    if mixture is None or keys.optional(*mixture.count, low=0, high=MOST_EXPERTS) == 0:
        return ()
    if "moe_layers" in keys.values:
        return tuple(sorted(set(keys.integers("moe_layers", layers - 1))))
    first = keys.optional("first_k_dense_replace", "moe_layer_start_index", low=0) or 0
    step = (
        keys.optional("decoder_sparse_step", "interleave_moe_layer_step", "moe_layer_interval") or 1
    )
    dense = set(keys.integers("mlp_only_layers", layers))
    return tuple(i for i in range(first, layers) if i not in dense and (i + 1) % step == 0)


def mixture_groups(
    keys: Keys, mixture: Mixture, family: Family, hidden: int, layers: tuple[int, ...]
) -> tuple[list[Linear], list[Experts], list[Tensor]]:
    """Shared experts and router gates as linears, fused experts, and the router's parameters."""
    count = keys.integer(*mixture.count, high=MOST_EXPERTS)
    active = keys.integer(*ACTIVE, high=count)
    size = keys.integer(*mixture.size)
    block = f"{family.layers}.{{}}.{mixture.block}"
    shapes: dict[str, tuple[int, ...]] = {
        "gate_up_proj": (2 * size, hidden),
        "down_proj": (hidden, size),
    }
    if mixture.input_first:
        shapes = {name: shape[::-1] for name, shape in shapes.items()}
    if mixture.bias:
        shapes |= {"gate_up_proj_bias": (2 * size,), "down_proj_bias": (hidden,)}
    experts = [
        Experts(f"{block}experts.{name}", count, active, shape, layers)
        for name, shape in shapes.items()
    ]
    linears = shared_linears(keys, mixture, block, hidden, layers)
    router = f"{block}{mixture.router}"
    if mixture.router_linear:
        linears.append(Linear(router, hidden, count, False, layers, "router", quantizable=False))
        return linears, experts, []
    tensors = [Tensor(f"{router}.weight", (count, hidden), layers, "other")]
    if mixture.statics:
        tensors.append(Tensor(f"{block}{mixture.statics}", (1, count), layers, "other"))
    if mixture.bias:
        tensors.append(Tensor(f"{router}.bias", (count,), layers, "other"))
    return linears, experts, tensors


def shared_linears(
    keys: Keys, mixture: Mixture, block: str, hidden: int, layers: tuple[int, ...]
) -> list[Linear]:
    """The experts that every token passes, which are ordinary linear modules."""
    if not mixture.shared:
        return []
    times = keys.integer(mixture.shared_count, low=0) if mixture.shared_count else 1
    size = times * keys.integer(*mixture.shared_size)
    if size == 0:
        return []
    shared = f"{block}{mixture.shared}."
    linears = [
        Linear(f"{shared}gate_proj", hidden, size, False, layers, "mlp"),
        Linear(f"{shared}up_proj", hidden, size, False, layers, "mlp"),
        Linear(f"{shared}down_proj", size, hidden, False, layers, "mlp"),
    ]
    if mixture.shared_gate:
        gate = f"{block}{mixture.shared_gate}"
        linears.append(Linear(gate, hidden, 1, False, layers, "router"))
    return linears
