"""Files that nobody has vouched for: unknown families, wrong values, other kinds of files."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftcli.architecture.config import architecture_from, read_architecture
from peftcli.architecture.layouts import LAYOUTS
from peftcli.architecture.others import refuse_hybrids
from peftcli.errors import ArtefactError

PLAIN = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 128,
}


def test_an_unknown_family_is_taken_for_a_plain_decoder() -> None:
    known = architecture_from(PLAIN)
    unknown = architecture_from({**PLAIN, "model_type": "brand_new"})
    assert not unknown.exact
    assert unknown.parameters() == known.parameters()
    mixture = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    sparse = architecture_from({**PLAIN, **mixture, "model_type": "brand_new"})
    assert sum(e.parameters() for e in sparse.experts) == 2 * 4 * 3 * 16 * 32


def test_an_unknown_wrapper_gives_its_language_model() -> None:
    wrapped = architecture_from({"model_type": "seeing_llama", "text_config": PLAIN})
    assert not wrapped.exact
    assert wrapped.parameters() == architecture_from(PLAIN).parameters()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"vocab_size": 1e30}, "vocab_size is 1e[+]30"),
        ({"vocab_size": math.nan}, "vocab_size is nan"),
        ({"vocab_size": "128"}, "vocab_size is '128'"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"num_hidden_layers": 10**8}, "num_hidden_layers is 100000000"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "hidden_size is 32"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
        ({"quantization_config": 3}, "quantization_config is 3"),
        ({"model_type": 7}, "model_type is 7"),
        ({"model_type": None}, "model_type is missing"),
        ({"model_type": None, "tokenizer_class": "X"}, "configuration of a tokenizer"),
        ({"model_type": None, "peft_type": "LORA"}, "configuration of an adapter"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "no causal language model"),
        ({"model_type": "new", "is_encoder_decoder": True}, "no causal language model"),
    ],
)
def test_wrong_values_are_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ArtefactError, match=named) as caught:
        architecture_from({**PLAIN, **change}, where="x/config.json")
    assert caught.value.message.startswith("x/config.json: ")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("kind", "missing"), [("mamba", "num_attention_heads"), ("mamba2", "intermediate_size")]
)
def test_a_state_space_model_is_refused_with_the_reason(kind: str, missing: str) -> None:
    config = {"model_type": kind, "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_heads": 4} if kind == "mamba2" else {}
    with pytest.raises(
        ArtefactError, match=f"'{kind}' models are not supported.*{missing}"
    ) as caught:
        architecture_from({**config, **heads, "architectures": ["XForCausalLM"]})
    assert "TRL and PEFT" in caught.value.hint


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mamba_d_state", 16),
        ("state_size", 8),
        ("lru_width", 32),
        ("linear_num_value_heads", 4),
        ("conv_L_cache", 3),
        ("layer_types", ["full_attention", "linear_attention"]),
    ],
)
def test_layers_without_attention_are_no_plain_decoder(key: str, value: object) -> None:
    """All keys of a decoder are there, and half of the layers are of another kind."""
    hybrid = architecture_from({**PLAIN, "model_type": "hybrid", key: value})
    assert (hybrid.exact, str(hybrid.other_layers).partition(":")[0]) == (False, key)
    with pytest.raises(ArtefactError, match=f"'hybrid' models are not estimated.*{key}"):
        refuse_hybrids(hybrid, "m")
    attention = {"layer_types": ["full_attention", "sliding_attention"]}
    plain = architecture_from({**PLAIN, "model_type": "brand_new", **attention})
    assert (plain.exact, plain.other_layers) == (False, None)
    refuse_hybrids(plain, "m")


@pytest.mark.parametrize("content", ["[1]", '"text"', "{", "\x00", "[" * 100_000, "null"])
def test_other_files_are_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ArtefactError, match=r"config\.json"):
        read_architecture(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="no such file"):
        read_architecture(tmp_path)


OTHER_KEYS = (
    *("head_dim", "num_experts", "mlp_only_layers", "layers_block_type", "text_config"),
    *("vision_config", "quantization_config", "sliding_window"),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([*sorted(LAYOUTS), "gemma3", "other"]),
    st.dictionaries(
        st.sampled_from([*PLAIN, *OTHER_KEYS]),
        JSON,
    ),
)
def test_no_configuration_crashes(model_type: str, values: dict[str, Any]) -> None:
    try:
        architecture = architecture_from({**PLAIN, **values, "model_type": model_type})
    except ArtefactError:
        return
    assert architecture.parameters() > 0


def test_reading_imports_no_heavy_library() -> None:
    code = (
        "import sys, peftcli.architecture.config as c;"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'pydantic'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
