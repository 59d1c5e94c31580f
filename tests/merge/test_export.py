"""Leaving the house: Ollama's Modelfile, vLLM's rules, llama.cpp's names, and the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from peftcli.bundled import bundled
from peftcli.merge.checkpoint import read_safetensors
from peftcli.merge.modelfile import go_template, learn_pieces, write_modelfile
from peftcli.merge.result import (
    BaseUsed,
    Distance,
    MergeResult,
    Precision,
    Proof,
    Verification,
)
from peftcli.merge.servable import check_servable
from peftcli.merge.show import show_merge, show_servable
from peftcli.merge.source import AdapterSource

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    + CHATML
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]\n\n{{ m.content | trim }}[end]"
    "{% endfor %}{% if add_generation_prompt %}[assistant]\n\n{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' "
    "else ' ' + m.content + '</s>' }}{% endfor %}"
)
BRACES = CHATML.replace("<|im_start|>", "{{ '{{' }}")
FOLDED = (
    "{% for m in messages %}{% if m.role == 'user' %}<u>"
    "{% if loop.first %}{{ messages | length }}{% endif %}{{ m.content }}</u>"
    "{% elif m.role == 'assistant' %}<a>{{ m.content }}</a>{% endif %}{% endfor %}<a>"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    source = bundled("bundled:tiny")
    return AutoTokenizer.from_pretrained(source)


@pytest.mark.parametrize("template", [CHATML, DEFAULT_SYSTEM, HEADERS, BRACES])
def test_pieces_of_a_template(template: str, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = template
    pieces = learn_pieces(tokenizer)
    assert pieces is not None
    talk = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye."},
    ]
    for messages in (talk, talk[1:], talk[1:2]):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert pieces.render(messages) == text.removeprefix(tokenizer.bos_token or "")


def test_go_template(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = DEFAULT_SYSTEM
    pieces = learn_pieces(tokenizer)
    assert pieces is not None
    assert go_template(pieces) == (
        "{{ if not .System }}<|im_start|>system\nYou help.<|im_end|>\n{{ end }}"
        "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        '{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}'
        "{{ if not $last }}<|im_end|>\n{{ end }}{{ end }}"
        '{{ if and (ne .Role "assistant") $last }}<|im_start|>assistant\n{{ end }}{{ end }}'
    )
    tokenizer.chat_template = BRACES
    pieces = learn_pieces(tokenizer)
    assert pieces is not None
    assert '{{ "{{" }}user' in go_template(pieces)


@pytest.mark.parametrize(
    ("template", "line", "note"),
    [
        (CHATML, "TEMPLATE", None),
        (NO_SYSTEM, "TEMPLATE", "takes no system message"),
        (FOLDED, None, "does more than put text around messages"),
        (None, "{{ .Prompt }}", None),
    ],
)
def test_modelfile(
    template: str | None,
    line: str | None,
    note: str | None,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    end = int(tokenizer.eos_token_id)
    notes = write_modelfile(tmp_path, [end])
    text = (tmp_path / "Modelfile").read_text()
    assert text.startswith("FROM .\n")
    assert f'PARAMETER stop "{tokenizer.eos_token}"' in text
    assert ("TEMPLATE" in text) is (line is not None)
    assert line is None or line in text
    assert (note is None and notes == ()) or str(note) in notes[0]


def servable(**values: Any) -> Any:
    config = {"peft_type": "LORA", "r": 16, "bias": "none", "target_modules": ["q_proj"]} | values
    return check_servable(AdapterSource("a", Path("runs/a"), config, None, None))


def test_servable_adapter(capsys: pytest.CaptureFixture[str]) -> None:
    answer = servable()
    assert answer.servable
    assert answer.flags == ("--enable-lora", "--lora-modules", "a=runs/a")
    spaced = check_servable(
        AdapterSource("a", Path("my runs/a"), {"peft_type": "LORA"}, None, None)
    )
    show_servable(spaced, as_json=False)
    assert "--lora-modules 'a=my runs/a'" in capsys.readouterr().out
    wide = servable(rank_pattern={"q_proj": 200})
    assert wide.rank == 200
    assert wide.flags[-2:] == ("--max-lora-rank", "256")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias: all"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"trainable_token_indices": [1]}, "embedding rows"),
        ({"r": 513}, "rank 513 is above 512"),
        ({"peft_type": "IA3"}, "IA3 adapters are not LoRA"),
        ({"peft_type": "BOTTLENECK"}, "BOTTLENECK adapters are not LoRA"),
    ],
)
def test_adapter_that_vllm_refuses(
    values: dict[str, Any], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = servable(**values)
    assert not answer.servable
    assert answer.flags == ()
    show_servable(answer, as_json=False)
    printed = capsys.readouterr().out
    assert reason in printed
    cannot = values.get("peft_type") == "BOTTLENECK" or "init_lora_weights" in values
    assert ("merge it: peftcli merge a" in printed) is not cannot


def result() -> MergeResult:
    near, far = Distance(0.01, 0.001, 1.0, 1e-6), Distance(3.2, 0.23, 0.91, 0.015)
    return MergeResult(
        output=Path("runs/a/merged"),
        base=BaseUsed("org/base", Path("/b"), "c0ffee", "dequantized", "why", "nf4", 28),
        adapters=(("runs/a", 1.0),),
        method="qlora",
        combine=None,
        density=None,
        arithmetic="float32",
        dtypes={"bfloat16": 38},
        tensors=38,
        tensors_changed=28,
        tensors_added=("lm_head.weight",),
        untied=True,
        vocabulary=(128, 131),
        bytes=16_100_000_000,
        seconds=61.0,
        peak_memory_gib=1.5,
        precision=Precision(1000, 250, 0.2),
        proof=Proof(10, 28, ()),
        verification=Verification(8, 584, "plain text", 3.7, near, near, "bfloat16", 0.03, far),
        not_verified=None,
        exported=("Modelfile",),
        warnings=("25% lost",),
    )


def test_shown_result(capsys: pytest.CaptureFixture[str]) -> None:
    show_merge(result(), as_json=False)
    text = capsys.readouterr().out
    for part in (
        "25.0% of these weights kept their old value",
        "untied",
        "128 -> 131 rows",
        "merged vs base + adapter",
        "4-bit vs original base, same adapter",
        "2.30e-01",
        "warning: 25% lost",
        "done: runs/a/merged (16.1 GB) in 61.0 s, peak 1.50 GiB",
    ):
        assert part in text, part


def test_result_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    show_merge(result(), as_json=True)
    values = json.loads(capsys.readouterr().out)
    assert values["precision"] == {
        "touched": 1000,
        "unchanged": 250,
        "relative_error": 0.2,
        "lost_share": 0.25,
    }
    assert values["verification"]["base_gap"]["mean"] == 0.23


def test_llama_cpp_knows_every_tensor() -> None:
    """As far as its Python package goes: the converter itself is a script of its repository."""
    gguf = pytest.importorskip("gguf")
    source = bundled("bundled:tiny")
    assert source is not None
    config = json.loads((source / "config.json").read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    stored = read_safetensors(source / "model.safetensors")
    unknown = [name for name in stored if not names.get_name(name, (".weight", ".bias"))]
    assert unknown == []
