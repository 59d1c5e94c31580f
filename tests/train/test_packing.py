"""Packed rows: the same losses as alone, and no row sees another."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peftcli.train.collator import Collator
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM

from peftcli.architecture.config import architecture_from
from peftcli.errors import RecipeError
from peftcli.recipe.checks import PACKABLE, UNPACKABLE, check_architecture
from peftcli.recipe.document import Document
from peftcli.recipe.load import validate
from peftcli.train.setting import pack

collate = Collator(pad_token_id=0)


def rows(seed: int = 0) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in (5, 9, 12, 7):
        ids = torch.randint(3, 128, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": ids})
    return made


def token_losses(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Loss of each trained position, in the order of the batch."""
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="none"
    )
    return loss[labels[:, 1:].flatten() != -100]


def packed(lengths: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    return collate(list(pack(Dataset.from_list(lengths), 64)))


@pytest.fixture(params=sorted(PACKABLE))
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(request.param)).eval()


def test_the_loss_of_packed_rows_is_that_of_the_rows_alone(model: torch.nn.Module) -> None:
    alone = [token_losses(model, collate([row])) for row in rows()]
    together = token_losses(model, packed(rows()))
    expected = sorted(torch.cat(alone).tolist())
    assert sorted(together.tolist()) == pytest.approx(expected, rel=2e-5, abs=1e-6)


def test_a_changed_row_moves_no_other_rows_loss(model: torch.nn.Module) -> None:
    before, changed = rows(), rows()
    changed[0]["input_ids"] = changed[0]["labels"] = [5] * len(changed[0]["input_ids"])
    first, second = token_losses(model, packed(before)), token_losses(model, packed(changed))
    moved = (first != second).sum().item()
    assert 0 < moved <= len(changed[0]["input_ids"]) - 1


def test_the_padding_of_a_packed_batch_is_not_looked_at() -> None:
    batch = collate(
        [
            {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "seq_lengths": [1, 2]},
            {"input_ids": [8], "labels": [8], "seq_lengths": [1]},
        ]
    )
    assert batch["position_ids"].tolist() == [[0, 0, 1], [0, 0, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 7], [-100, -100, -100]]
    assert "attention_mask" not in batch


def test_no_row_is_cut_by_packing() -> None:
    together = pack(Dataset.from_list(rows()), 16)
    assert sorted(n for row in together for n in row["seq_lengths"]) == [5, 7, 9, 12]
    assert all(len(row["input_ids"]) <= 16 for row in together)


@pytest.mark.parametrize("model_type", ["falcon", "opt"])
def test_a_model_that_cannot_be_packed_is_refused(model_type: str) -> None:
    assert model_type in UNPACKABLE
    recipe = {
        "model": "m",
        "method": "lora",
        "data": {"train": "x"},
        "training": {"packing": True},
        "output": "o",
    }
    architecture = architecture_from(tiny_config(model_type).to_dict())
    with pytest.raises(RecipeError, match=f"{model_type} models cannot be packed"):
        check_architecture(validate(Document("t", recipe)), architecture)
