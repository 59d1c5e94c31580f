"""Small parameters in one tensor: the same steps, and nothing kept beyond them."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from bitsandbytes.optim import AdamW, AdamW8bit, GlobalOptimManager
from torch import nn

from peftcli.train import flat as module
from peftcli.train.flat import FlatParameters, forget_settings


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 40))


def train(model: nn.Module, optimizer: Any, flat: FlatParameters | None, steps: int = 4) -> None:
    """Steps over two micro-batches each; the last layer is left out of the second."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        if flat is not None:
            flat.release()
        rows = torch.randn(2, 5, 6, generator=generator)
        model(rows[0]).square().sum().backward()
        model[1](model[0](rows[1])).square().sum().backward()  # type: ignore[index]
        if flat is not None:
            flat.gather()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.zero_grad()


def test_the_steps_are_those_of_single_parameters() -> None:
    single, joined = layers(), layers()
    train(single, AdamW(single.parameters(), lr=1e-2), None)
    optimizer = AdamW(joined.parameters(), lr=1e-2)
    flat = FlatParameters(optimizer)
    assert len(optimizer.param_groups[0]["params"]) == 1
    train(joined, optimizer, flat)
    for one, other in zip(single.parameters(), joined.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_step_without_gradients_changes_nothing() -> None:
    model = layers()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    flat = FlatParameters(optimizer)
    train(model, optimizer, flat)
    before = [x.detach().clone() for x in model.parameters()]
    flat.release()
    flat.gather()
    optimizer.step()
    for one, other in zip(before, model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_no_flat_gradient_outlives_its_step() -> None:
    model = layers()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    flat = FlatParameters(optimizer)
    train(model, optimizer, flat)
    flat.release()
    assert [x.grad for x in optimizer.param_groups[0]["params"]] == [None]


def test_large_parameters_and_those_with_settings_stay_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "LARGE", 200)
    model = nn.Sequential(nn.Embedding(9, 6), *layers())
    forget_settings()
    manager = GlobalOptimManager.get_instance()
    manager.register_module_override(model[0], "weight", {"optim_bits": 32})
    optimizer = AdamW8bit(model.parameters(), lr=1e-2)
    FlatParameters(optimizer)
    flat, *alone = optimizer.param_groups[0]["params"]
    assert [id(x) for x in alone] == [id(model[0].weight), id(model[3].weight)]
    assert flat.numel() == sum(x.numel() for x in layers().parameters()) - 240


def test_an_earlier_model_is_let_go() -> None:
    model = nn.Embedding(9, 6)
    manager = GlobalOptimManager.get_instance()
    manager.register_module_override(model, "weight", {"optim_bits": 32})
    gone = weakref.ref(model)
    del model
    forget_settings()
    gc.collect()
    assert gone() is None


def test_parameters_keep_their_dtypes() -> None:
    model = layers()
    model[1].bfloat16()
    FlatParameters(AdamW(model.parameters(), lr=1e-2))
    assert {x.dtype for x in model[1].parameters()} == {torch.bfloat16}
    assert {x.dtype for x in model[0].parameters()} == {torch.float32}
