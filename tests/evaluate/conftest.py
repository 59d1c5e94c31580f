"""Small finished runs, each trained once for all tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from colours import COLOURS, Train, colour_rows, write_rows
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from peftcli.recipe.document import Document
from peftcli.recipe.load import validate
from peftcli.train.run import Options, run


@pytest.fixture(scope="session")
def train_colours(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Train a recipe on the colour rows; returns the run folder."""

    def train(**sections: object) -> Path:
        folder = tmp_path_factory.mktemp("colours")
        rows = write_rows(folder / "rows.jsonl", colour_rows())
        values: dict[str, object] = {
            "model": str(base_model),
            "method": {"name": "lora", "rank": 16, "modules_to_save": ["lm_head"]},
            "data": {
                "train": str(rows),
                "eval": 0.25,
                "max_length": 64,
                "labels": list(COLOURS),
            },
            "training": {"max_steps": 60, "batch_size": 16, "learning_rate": 1e-2},
            "evaluation": {"steps": 30},
            "output": str(folder / "run"),
        }
        for name, section in sections.items():
            old = values.get(name)
            both = isinstance(old, dict) and isinstance(section, dict) and name != "method"
            values[name] = {**old, **section} if both else section
        os.environ["PEFTCLI_CACHE"] = str(tmp_path_factory.getbasetemp() / "cache")
        os.environ["HF_HUB_OFFLINE"] = "1"
        return run(validate(Document("test.yaml", values)), Options(), lambda event: None).output

    return train


@pytest.fixture(scope="session")
def colour_run(train_colours: Train) -> Path:
    """A LoRA run that has learned its task."""
    return train_colours()


@pytest.fixture(scope="session")
def tiny_base(base_model: Path) -> Callable[[str, Path], Path]:
    """Save a random model of another family beside the tokenizer of `base_model`."""

    def build(family: str, folder: Path) -> Path:
        AutoTokenizer.from_pretrained(base_model).save_pretrained(folder)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        own = (
            {"n_positions": 128}
            if family == "gpt2"
            else {
                "intermediate_size": 48,
                "num_key_value_heads": 1,
                "head_dim": 16,
                "max_position_embeddings": 128,
            }
        )
        tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        config = AutoConfig.for_model(family, vocab_size=288, **sizes, **own, **tokens)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        return folder

    return build
