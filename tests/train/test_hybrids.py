"""Models that mix attention with other layers: trained, though nobody can tell their memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import HIDDEN, INTERMEDIATE
from transformers import AutoTokenizer, Lfm2Config, Lfm2ForCausalLM

from peftcli.errors import RecipeError, UsageError
from peftcli.estimate.command import Choices, estimate_recipe
from peftcli.events import Event, Note
from peftcli.recipe.document import Document
from peftcli.recipe.load import LoadedRecipe, validate
from peftcli.train.dry_run import dry_run
from peftcli.train.plan import blind_load
from peftcli.train.run import Options, run


@pytest.fixture
def hybrid(base_model: Path, tmp_path: Path) -> Path:
    """One layer of convolution below one of attention."""
    folder = tmp_path / "lfm2"
    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=288,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
    )
    Lfm2ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_model).save_pretrained(folder)
    return folder


def recipe(model: Path, rows: Path, **training: object) -> LoadedRecipe:
    values = {
        "model": str(model),
        "method": {"name": "lora", "rank": 4},
        "data": {"train": str(rows), "max_length": 64},
        "training": {"max_steps": 2, "batch_size": 4, **training},
        "output": str(model.parent / "run"),
    }
    return validate(Document("test.yaml", values))


def test_a_hybrid_trains_and_says_what_is_not_known(hybrid: Path, rows: Path) -> None:
    events: list[Event] = []
    result = run(recipe(hybrid, rows), Options(), events.append)
    assert result.steps == 2
    told = [event.text for event in events if isinstance(event, Note)]
    assert any("lfm2 models cannot be estimated" in text for text in told)
    manifest = json.loads((Path(result.output) / "run.json").read_text())
    size = sum(p.numel() for p in Lfm2ForCausalLM.from_pretrained(hybrid).parameters())
    assert manifest["parameters"] == size


def test_a_dry_run_does_not_guess_its_parameters(hybrid: Path, rows: Path) -> None:
    seen = dry_run(recipe(hybrid, rows), lambda event: None, offline=True)
    assert (seen.parameters, seen.trainable_parameters) == (None, None)
    assert "parameters: not known yet" in seen.plan


def test_estimate_refuses_it_and_nothing_packs_it(hybrid: Path, rows: Path) -> None:
    with pytest.raises(UsageError, match=r"not estimated.*conv"):
        estimate_recipe(recipe(hybrid, rows), Choices(offline=True))
    with pytest.raises(RecipeError, match="cannot be packed"):
        run(recipe(hybrid, rows, packing=True), Options(), lambda event: None)


def test_on_a_gpu_auto_is_what_takes_least(hybrid: Path, rows: Path) -> None:
    load = blind_load(recipe(hybrid, rows).recipe)
    assert (load.micro_batch_size, load.mode, len(load.reasons)) == (1, "full", 2)
    own = blind_load(recipe(hybrid, rows, micro_batch_size=2, checkpointing="none").recipe)
    assert (own.micro_batch_size, own.mode, own.reasons) == (2, "none", ())
