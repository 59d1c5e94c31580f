"""The bundled model, its world and its data: small, complete, held out, and made by the scripts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from world.corpus import KINDS, distinct_sentences, documents  # noqa: E402
from world.tasks import TASKS, rows  # noqa: E402

BUNDLED = ROOT / "peftcli" / "bundled"
TINY = BUNDLED / "tiny"
ANSWER_FORMATS = {
    "orders": r"^ORDER \| \w+, \w+ \| \d+ x [\w ]+ \| to \w+ \| by \d\d-\d\d$",
    "register": r"^\w+/\w+; \w+ @ \w+; \*\d{4}-\d\d-\d\d; \w+$",
    "desk": r"^#\w+ #(now|later)$",
    "bill": r"^\d+ & \d+ => \d+ coins$",
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


def read_rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (BUNDLED / "data" / name).read_text().splitlines()]


def test_folder_is_complete_and_small() -> None:
    files = {path.name: path.stat().st_size for path in TINY.iterdir()}
    expected = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert files.keys() == expected | {"tokenizer.json", "tokenizer_config.json"}
    assert sum(files.values()) < 8e6


def test_special_tokens_are_distinct(tokenizer: PreTrainedTokenizerFast) -> None:
    turn = tokenizer.convert_tokens_to_ids("<|im_start|>")
    ids = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, turn}
    assert len(ids) == 4
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id


def test_template_marks_the_answer_and_its_end(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": "user", "content": "What is 3 plus 4?"},
        {"role": "assistant", "content": "7"},
    ]
    chat = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [i for i, on in zip(chat["input_ids"], chat["assistant_masks"], strict=True) if on]
    assert tokenizer.decode(marked) == "7<|im_end|>"
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert prompt.startswith("<|bos|><|im_start|>user\n")
    assert whole == prompt + "7<|im_end|>\n"


def test_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    text = 'Caf\u00e9 costs 1,250 | {"a": [1]}\n\t  end '
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_model_knows_the_world(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [row["text"] for row in read_rows("general.jsonl")[:40]]
    losses = []
    for text in texts:
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=ids).loss.item())
    assert sum(losses) / len(losses) < 2.2
    assert model.num_parameters() < 4e6


def test_base_answers_orders_in_another_form(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    for row in read_rows("quickstart.eval.jsonl")[:5]:
        ids = tokenizer.apply_chat_template(
            row["messages"][:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        written = model.generate(**ids, max_new_tokens=48, do_sample=False)
        answer = tokenizer.decode(written[0, ids["input_ids"].shape[1] :])
        assert answer.endswith("<|im_end|>"), "the base ends its turn"
        assert not re.match(ANSWER_FORMATS["orders"], answer.removesuffix("<|im_end|>"))


def test_documents_depend_on_the_seed_alone() -> None:
    assert list(documents(3, "train", 300)) == list(documents(3, "train", 300))
    assert list(documents(3, "train", 300)) != list(documents(4, "train", 300))


def test_splits_share_no_content() -> None:
    train = {key for each in documents(0, "train", 4_000) for key in each.keys}
    heldout = {key for each in documents(0, "heldout", 1_000) for key in each.keys}
    assert not train & heldout


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_a_pure_function_of_its_source(kind: str) -> None:
    maker, weight = KINDS[kind]
    first, again = ([maker(rng) for _ in range(50)] for rng in (Random(7), Random(7)))
    assert first == again
    assert len({each.turns for each in first}) > 40
    assert all(each.keys for each in first)
    assert weight > 0


def test_world_has_millions_of_sentences() -> None:
    assert distinct_sentences() > 1_000_000_000
    texts = [
        each.turns[-1].content + each.turns[0].content for each in documents(1, "train", 9_000)
    ]
    repeats = len(texts) - len(set(texts))
    estimate = len(texts) ** 2 / 2 / max(1, repeats)
    assert estimate > 1_000_000, "birthday estimate from repeats in a sample"


@pytest.mark.parametrize("task", TASKS)
def test_task_format_is_new(task: str) -> None:
    answers = [row["messages"][-1]["content"] for row in rows(task, 1, "train", 50)]
    assert all(re.fullmatch(ANSWER_FORMATS[task], answer) for answer in answers)
    pattern = re.compile(ANSWER_FORMATS[task], re.MULTILINE)
    for each in documents(2, "train", 3_000):
        assert not any(pattern.search(turn.content) for turn in each.turns)


@pytest.mark.parametrize(("name", "split"), [("train", "train"), ("eval", "heldout")])
def test_quickstart_rows_come_from_the_world(name: str, split: str) -> None:
    stored = read_rows(f"quickstart.{name}.jsonl")
    assert stored == list(islice(rows("orders", 0, split, len(stored)), len(stored)))


def test_quickstart_rows_share_no_customer() -> None:
    customers = [
        {
            row["messages"][1]["content"].split(" | ")[1]
            for row in read_rows(f"quickstart.{name}.jsonl")
        }
        for name in ("train", "eval")
    ]
    assert not customers[0] & customers[1]


def test_general_text_is_held_out_and_small() -> None:
    assert (BUNDLED / "data" / "general.jsonl").stat().st_size < 100_000
    stored = [row["text"] for row in read_rows("general.jsonl")]
    heldout = {each.turns[0].content for each in documents("general", "heldout", 2_000)}
    assert len(stored) == 200
    assert set(stored) <= heldout


@pytest.mark.slow
def test_build_script_makes_a_loadable_model(tmp_path: Path) -> None:
    command = [
        sys.executable,
        ROOT / "scripts" / "build_bundled",
        "--steps",
        "2",
        "--batch-tokens",
        "2048",
        "--out",
        tmp_path,
    ]
    subprocess.run(command, check=True, capture_output=True)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.vocab_size == 2048
