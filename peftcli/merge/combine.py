"""Several adapters on one base -> one set of changes.

TIES: Yadav et al., 2023, arXiv 2306.01708. DARE: Yu et al., 2023, arXiv 2311.03099.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Mapping, Sequence

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, ties
from torch import Tensor

from peftcli.errors import ArtefactError
from peftcli.merge.adapter import LoadedAdapter
from peftcli.merge.deltas import Region, Update, run_chain
from peftcli.merge.options import Combine
from peftcli.merge.plan import Changes

Function = Callable[[list[Tensor], Tensor, float], Tensor]
FUNCTIONS: dict[Combine, Function] = {
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
}
_random = threading.Lock()  # DARE draws from PyTorch's global generator


def combined(
    adapters: Sequence[LoadedAdapter], weights: Sequence[float], how: Combine, density: float
) -> Changes:
    """The changes of all adapters; each linear update holds its weight in its scale already.

    Raises ArtefactError when the adapters carry different base embeddings.
    """
    names = list(dict.fromkeys(name for adapter in adapters for name in adapter.updates))
    updates: dict[str, Sequence[Update]] = {}
    for name in names:
        chains = [adapter.updates.get(name, []) for adapter in adapters]
        if how != "linear":
            updates[name] = [_fused(name, chains, weights, FUNCTIONS[how], density)]
        elif (len(adapters) == 1 and weights[0] == 1) or _all_weighted(chains):
            updates[name] = [update for chain in chains for update in chain]
        else:
            updates[name] = [_weighted(chains, weights)]
    tied_rows = any(adapter.tied_rows for adapter in adapters)
    return Changes(updates, _carried(adapters), tied_rows)


def _all_weighted(chains: Sequence[Sequence[Update]]) -> bool:
    return all(update.weighted for chain in chains for update in chain)


def _weighted(chains: Sequence[Sequence[Update]], weights: Sequence[float]) -> Update:
    """Each adapter's change of the base times its weight, where a scale cannot hold the weight."""

    def replace(values: Tensor, region: Region, base: Tensor) -> Tensor:
        total = values.float()
        for chain, weight in zip(chains, weights, strict=True):
            factor = 1.0 if _all_weighted([chain]) else weight
            total = total + factor * (run_chain(chain, values, region).float() - values.float())
        return total.to(values.dtype)

    whole = any(update.whole for chain in chains for update in chain)
    return Update(replace=replace, whole=whole, content=_content(chains, weights))


def _fused(
    name: str,
    chains: Sequence[Sequence[Update]],
    weights: Sequence[float],
    function: Function,
    density: float,
) -> Update:
    """TIES and DARE judge whole updates against each other."""

    def replace(values: Tensor, region: Region, base: Tensor) -> Tensor:
        exact = values.float()
        tasks = [run_chain(chain, exact, region) - exact for chain in chains]
        factors = torch.tensor(weights, device=values.device)
        with _random, torch.random.fork_rng():
            torch.manual_seed(zlib.crc32(name.encode()))
            return (exact + function(tasks, factors, density)).to(values.dtype)

    return Update(replace=replace, whole=True, content=_content(chains, weights))


def _content(chains: Sequence[Sequence[Update]], weights: Sequence[float]) -> tuple[Tensor, ...]:
    parts = [part for chain in chains for update in chain for part in update.content]
    return (*parts, torch.tensor(weights)) if parts else ()


def _carried(adapters: Sequence[LoadedAdapter]) -> Mapping[str, Update]:
    found: dict[str, Update] = {}
    for adapter in adapters:
        for name, update in adapter.carried.items():
            if name in found and not found[name].same_as(update):
                raise ArtefactError(
                    f"{adapter.source.name}: comes with another {name} than the adapters before it",
                    "merge one at a time",
                )
            found[name] = update
    return found
