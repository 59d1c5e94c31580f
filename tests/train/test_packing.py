"""Rows that lie end to end: the same losses as alone, and no row sees another."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM

from peftcli.architecture.config import architecture_from
from peftcli.errors import RecipeError
from peftcli.recipe.checks import NO_VARLEN, PACKABLE, UNPACKABLE, check_architecture
from peftcli.recipe.document import Document
from peftcli.recipe.load import validate
from peftcli.train import attention
from peftcli.train.batches import Batches, model_inputs, padded
from peftcli.train.run import Options, run
from peftcli.train.setting import pack, settle

LENGTHS = (5, 9, 12, 7)


def rows(seed: int = 0, lengths: tuple[int, ...] = LENGTHS) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        ids = torch.randint(3, 128, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": ids})
    return made


def micro_batches(parts: list[Any], **options: Any) -> list[dict[str, Any]]:
    settings: dict[str, Any] = {"micro_batch_size": 4, "longest": 64, "apart": True}
    found: list[dict[str, Any]] = Batches(0, **settings | options)(parts)["micro_batches"]
    return found


def token_losses(model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Loss of each trained position, in the order of the batch."""
    inputs = model_inputs(batch)
    labels = inputs.pop("labels")
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="none"
    )
    return loss[labels[:, 1:].flatten() != -100]


IMPLEMENTATIONS = [(name, True) for name in sorted(PACKABLE - NO_VARLEN)]
IMPLEMENTATIONS += [(name, False) for name in sorted(PACKABLE)]


@pytest.fixture(params=IMPLEMENTATIONS, ids=lambda x: f"{x[0]} {'borders' if x[1] else 'mask'}")
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(0)
    attention.register()
    name, borders = request.param
    chosen = {"attn_implementation": attention.NAME} if borders else {}
    return AutoModelForCausalLM.from_config(tiny_config(name), **chosen).eval()


def test_the_loss_of_rows_end_to_end_is_that_of_the_rows_alone(model: torch.nn.Module) -> None:
    alone = [token_losses(model, *micro_batches([row])) for row in rows()]
    together = token_losses(model, *micro_batches(rows()))
    expected = sorted(torch.cat(alone).tolist())
    assert sorted(together.tolist()) == pytest.approx(expected, rel=2e-5, abs=1e-6)


def test_a_changed_row_moves_no_other_rows_loss(model: torch.nn.Module) -> None:
    before, changed = rows(), rows()
    longest = max(changed, key=lambda row: len(row["input_ids"]))  # the others come after it
    longest["input_ids"] = longest["labels"] = [5] * len(longest["input_ids"])
    first, second = (token_losses(model, *micro_batches(x)) for x in (before, changed))
    moved = (first != second).sum().item()
    assert 0 < moved <= len(longest["input_ids"]) - 1


def test_packed_rows_keep_the_texts_in_them_apart(model: torch.nn.Module) -> None:
    packed = list(pack(Dataset.from_list(rows()), 64).with_format("numpy"))
    assert len(packed) == 1
    together = sorted(token_losses(model, *micro_batches(packed)).tolist())
    alone = [token_losses(model, *micro_batches([row])) for row in rows()]
    assert together == pytest.approx(sorted(torch.cat(alone).tolist()), rel=2e-5, abs=1e-6)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("family", sorted(PACKABLE - NO_VARLEN))
def test_borders_give_what_eager_attention_gives_with_padding(
    family: str, window: int | None
) -> None:
    attention.register()
    config = tiny_config(family)
    if window is not None:
        if family not in ("gemma3_text", "mistral", "qwen2", "qwen3"):
            pytest.skip("has no sliding window")
        config.sliding_window, config.use_sliding_window = window, True
        if getattr(config, "layer_types", None):
            config.layer_types = ["sliding_attention"] * len(config.layer_types)
    torch.manual_seed(0)
    borders = AutoModelForCausalLM.from_config(
        deepcopy(config), attn_implementation=attention.NAME
    ).eval()
    eager = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    eager.load_state_dict(borders.state_dict())
    found = sorted(token_losses(borders, *micro_batches(rows())).tolist())
    wanted = sorted(token_losses(eager, padded(rows(), 0)).tolist())
    assert found == pytest.approx(wanted, rel=1e-5)


def test_full_rows_lie_side_by_side() -> None:
    (batch,) = micro_batches(rows(lengths=(8, 8)), longest=8)
    assert batch["input_ids"].shape == (2, 8)
    assert batch["position_ids"].tolist() == [list(range(8))] * 2
    assert batch["trained"].tolist() == [*range(7), *range(8, 15)]
    assert "cu_seq_lens" not in batch


def test_a_step_is_cut_by_tokens_and_loses_no_row() -> None:
    parts = micro_batches(rows(), micro_batch_size=1, longest=16)
    sizes = [batch["input_ids"].numel() for batch in parts]
    assert max(sizes) <= 16
    assert sizes == [12, 16, 5]  # 9 and 7 share one
    found = [set(batch["cu_seq_lens"].diff().tolist()) for batch in parts]
    assert set.union(*found) == set(LENGTHS)


def test_padded_rows_count_the_same_tokens() -> None:
    apart, padded = (Batches(0, 2, 12, apart=x)(rows()) for x in (True, False))
    assert apart["trained_tokens"] == padded["trained_tokens"] == sum(LENGTHS) - len(LENGTHS)
    (first, second) = padded["micro_batches"]
    assert first["attention_mask"].sum(1).tolist() == [5, 9]
    assert second["labels"][1].tolist()[-5:] == [-100] * 5


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


@pytest.mark.parametrize("micro_batch_size", [4, "auto"])
@pytest.mark.parametrize(("attention", "alone"), [("eager", True), ("auto", False)])
def test_packed_rows_behind_a_mask_are_computed_one_sequence_at_a_time(
    base_model: Path, tmp_path: Path, micro_batch_size: int | str, attention: str, alone: bool
) -> None:
    """A mask over several sequences would be as large as the square of them all."""
    file = tmp_path / "rows.jsonl"
    lines = [{"text": f"say {i} twice: {i} {i}"} for i in range(40)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    recipe = {
        "model": {"name": str(base_model), "attention": attention},
        "method": {"name": "lora", "rank": 2},
        "data": {"train": str(file), "max_length": 64},
        "training": {
            **{"packing": True, "batch_size": 4, "micro_batch_size": micro_batch_size},
            **{"max_steps": 1, "device": "cpu"},
        },
        "output": str(tmp_path / "out"),
    }
    loaded = validate(Document("t", recipe))
    plan = settle(loaded, lambda event: None).plan
    assert (plan.micro_batch_size, plan.accumulation) == ((1, 4) if alone else (4, 1))
    said = [reason for reason in plan.reasons if reason.startswith("micro_batch_size 1: a mask")]
    assert len(said) == alone
    assert run(loaded, Options(), lambda event: None).steps == 1
