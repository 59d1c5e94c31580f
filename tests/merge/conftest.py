"""Bases and trained adapters on disk, and PEFT's own merge of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from tiny_models import tiny_config, token_ids, train_steps
from transformers import AutoModelForCausalLM, PreTrainedModel

from peftcli.merge.options import MergeOptions
from peftcli.merge.result import MergeResult
from peftcli.merge.run import run

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """A base folder, an adapter folder, and what base + adapter say about `token_ids()`."""

    base: Path
    adapter: Path
    output: Path
    live: torch.Tensor
    dtype: torch.dtype
    vocabulary: int | None

    def merge(self, **options: Any) -> MergeResult:
        """Merge it with these options; what it tells is dropped."""
        values = {"output": self.output, "base_model": str(self.base), **options}
        return run(self.adapter, MergeOptions(**values), lambda text: None)

    def load_base(self) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        if self.vocabulary is not None:
            model.resize_token_embeddings(self.vocabulary, mean_resizing=False)
        return model

    def by_peft(self) -> Tensors:
        """PEFT's merge in float32, cast to the dtypes of the base; some routers keep float32."""
        model = PeftModel.from_pretrained(self.load_base(), self.adapter)
        merged = model.merge_and_unload(safe_merge=True).state_dict()
        base = AutoModelForCausalLM.from_pretrained(self.base, dtype=self.dtype).state_dict()
        return {name: tensor.to(base[name].dtype) for name, tensor in merged.items()}

    def loaded(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """The merged folder, as anybody loads it."""
        return AutoModelForCausalLM.from_pretrained(self.output, dtype=dtype or self.dtype)

    def logits(self) -> torch.Tensor:
        with torch.no_grad():
            return self.loaded(torch.float32)(token_ids()).logits


Make = Callable[..., Case]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost more than they bring at this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_case(tmp_path: Path) -> Make:
    """Save a random base, train an adapter on it for two steps, and save that."""

    def make(
        model_type: str,
        config: PeftConfig,
        *,
        dtype: torch.dtype = torch.bfloat16,
        tied: bool | None = None,
        vocabulary: int | None = None,
        shards: str = "50GB",
    ) -> Case:
        base, adapter = tmp_path / "base", tmp_path / "adapter"
        settings = tiny_config(model_type)
        if tied is not None:
            settings.tie_word_embeddings = tied
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(settings, dtype=dtype)
        model.save_pretrained(base, max_shard_size=shards)
        case = Case(base, adapter, tmp_path / "merged", torch.empty(0), dtype, vocabulary)
        tuned = get_peft_model(case.load_base(), config)
        train_steps(tuned, steps=2)
        tuned.save_pretrained(adapter)
        with torch.no_grad():
            live = tuned(token_ids()).logits
        return Case(base, adapter, case.output, live, dtype, vocabulary)

    return make
