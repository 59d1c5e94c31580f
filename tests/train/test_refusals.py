"""What `train` says where the estimate leaves no hope; a machine without a GPU can ask too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from peftcli.errors import ResourceError
from peftcli.estimate.gpus import find_gpu
from peftcli.estimate.run import run
from peftcli.events import Event, Warned
from peftcli.models import Device
from peftcli.recipe.document import Document
from peftcli.recipe.load import validate
from peftcli.recipe.schema import Recipe
from peftcli.train.refusals import refuse_what_cannot_fit
from peftcli.train.setting import Setting, settle


def setting(base: Path, rows: Path, gpu: str, model: str, method: str) -> Setting:
    """A real setting on this machine, with the estimate of a large model on another card."""
    values = {"model": str(base), "method": "lora", "data": {"train": str(rows)}, "output": "o"}
    loaded = validate(Document("test.yaml", {**values, "training": {"device": "cpu"}}))
    found = settle(loaded, lambda event: None)
    large = Recipe.model_validate({**values, "model": model, "method": method})
    card = find_gpu(gpu)
    device = Device("cuda", "bfloat16", card.name, 12.0)
    return replace(found, estimate=run(large, card), device=device)


def test_the_lines_that_are_enough_are_told(base_model: Path, rows: Path) -> None:
    one = setting(base_model, rows, "12GB", "llama-3.1-8b", "lora")
    with pytest.raises(ResourceError, match="this run needs about") as caught:
        refuse_what_cannot_fit(one, lambda event: None, force=False)
    assert caught.value.exit_code == 3
    assert caught.value.hint.startswith("write one of: method.name: qlora (saves")
    several = setting(base_model, rows, "12GB", "llama-3.1-8b", "full")
    with pytest.raises(ResourceError) as caught:
        refuse_what_cannot_fit(several, lambda event: None, force=False)
    assert "  method:\n    name: qlora" in caught.value.hint


def test_where_nothing_helps_that_is_said(base_model: Path, rows: Path) -> None:
    one = setting(base_model, rows, "12GB", "llama-3.1-405b", "qlora")
    with pytest.raises(ResourceError) as caught:
        refuse_what_cannot_fit(one, lambda event: None, force=False)
    assert "no change of the recipe is enough" in caught.value.hint


def test_force_goes_on_with_a_warning_and_what_fits_passes(base_model: Path, rows: Path) -> None:
    events: list[Event] = []
    one = setting(base_model, rows, "12GB", "llama-3.1-8b", "lora")
    refuse_what_cannot_fit(one, events.append, force=True)
    assert isinstance(events[0], Warned)
    fine = setting(base_model, rows, "24GB", "llama-3.1-8b", "qlora")
    refuse_what_cannot_fit(fine, events.append, force=False)
    assert len(events) == 1
