"""Tied embeddings trained apart or together, and vocabularies that grew or were cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from peft import LoraConfig

from peftcli.errors import ArtefactError

FLOAT = torch.float32
BOTH = ["embed_tokens", "lm_head"]


def lora(*targets: str, **values: Any) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", *targets], **values)


# name -> configuration, and whether the merged model needs two matrices
TIED: dict[str, tuple[LoraConfig, bool]] = {
    "update of the embedding": (lora("embed_tokens"), True),
    "update of the head": (lora("lm_head"), True),
    "an update of each": (lora(*BOTH), True),
    "one update of both": (lora("embed_tokens", ensure_weight_tying=True), False),
    "one update of both, both named": (lora(*BOTH, ensure_weight_tying=True), False),
    "embedding whole": (lora(modules_to_save=["embed_tokens"]), True),
    "head whole": (lora(modules_to_save=["lm_head"]), True),
    "each whole": (lora(modules_to_save=BOTH), True),
    "both whole, tied": (lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True), False),
    "token rows": (lora(trainable_token_indices=[3, 5, 9]), False),
    "dora on the embedding": (lora("embed_tokens", use_dora=True), True),
    "neither": (lora(), False),
}


@pytest.mark.parametrize(
    ("model_type", "form"),
    [("llama", form) for form in TIED]
    + [("gpt2", form) for form in TIED if not form.startswith("one update of both")],
)
def test_tied_embeddings(form: str, model_type: str, make_case: Callable[..., Any]) -> None:
    """PEFT's own merge is wrong by up to 30 for half of these; the unmerged model is the truth."""
    config, untied = deepcopy(TIED[form])  # PEFT writes into the configurations it is given
    if model_type == "gpt2":
        # PEFT 0.21 does not tie what is saved whole on GPT-2: the two matrices differ.
        untied = untied or config.ensure_weight_tying
        config = _for_gpt2(config)
    case = make_case(model_type, config, dtype=FLOAT, tied=True)
    result = case.merge()
    torch.testing.assert_close(case.logits(), case.live, atol=2e-6, rtol=0)
    assert result.untied is untied
    assert json.loads((case.output / "config.json").read_text())["tie_word_embeddings"] is (
        not untied
    )
    assert result.verification is not None
    assert result.verification.merged.maximum < 1e-5
    assert result.proof is not None
    assert result.proof.unchanged_updates == ()  # the base's own values count as no update


def test_an_update_that_peft_ties_badly_is_refused(make_case: Callable[..., Any]) -> None:
    """On GPT-2, PEFT saves factors of the head that its own configuration no longer names."""
    config, _ = deepcopy(TIED["one update of both, both named"])
    case = make_case("gpt2", _for_gpt2(config), dtype=FLOAT, tied=True)
    with pytest.raises(ArtefactError, match="its configuration does not"):
        case.merge()
    assert not case.output.exists()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        lora(),
        lora(modules_to_save=BOTH),
        lora(modules_to_save=["embed_tokens"]),
        lora(trainable_token_indices=[4, 129, 130]),
        lora(*BOTH),
    ],
    ids=["update only", "both whole", "embedding whole", "token rows", "both updated"],
)
def test_grown_vocabulary(config: LoraConfig, tied: bool, make_case: Callable[..., Any]) -> None:
    case = make_case("llama", deepcopy(config), dtype=FLOAT, tied=tied, vocabulary=131)
    result = case.merge()
    torch.testing.assert_close(case.logits(), case.live, atol=2e-6, rtol=0)
    assert result.vocabulary == (128, 131)
    assert case.loaded().config.vocab_size == 131


def test_new_rows_that_were_not_saved(make_case: Callable[..., Any]) -> None:
    case = make_case("llama", lora("embed_tokens"), dtype=FLOAT, tied=False, vocabulary=131)
    with pytest.raises(ArtefactError, match=r"3 new rows .* none for lm_head"):
        case.merge()
    assert not case.output.exists()


@pytest.mark.parametrize("targets", [(), ("embed_tokens",)])
def test_padded_vocabulary_does_not_shrink(
    targets: tuple[str, ...], make_case: Callable[..., Any]
) -> None:
    """The model was cut to its tokenizer for training; the base keeps its padding."""
    case = make_case("llama", lora(*targets), dtype=FLOAT, tied=False, vocabulary=120)
    result = case.merge()
    assert result.vocabulary is None
    assert case.logits().shape[-1] == 128
    torch.testing.assert_close(case.logits()[..., :120], case.live, atol=2e-6, rtol=0)


def _for_gpt2(config: LoraConfig) -> LoraConfig:
    names = {"embed_tokens": "wte", "q_proj": "c_attn"}
    values = config.to_dict()
    for key in ("target_modules", "modules_to_save"):
        if values[key]:
            values[key] = [names.get(name, name) for name in values[key]]
    return LoraConfig(**values)
