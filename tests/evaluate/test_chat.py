"""Chat: the answers of the run, with its template and stops, and the switch to the base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from peftcli.errors import UsageError
from peftcli.evaluate.chat import Chat, ChatOptions, open_chat, talk

ASKED = "701 grass"


@pytest.fixture
def chat(colour_run: Path) -> Chat:
    return open_chat(colour_run, ChatOptions(max_new_tokens=16))


def conversation(chat: Chat, *lines: str) -> str:
    left = iter(lines)
    written: list[str] = []
    talk(chat, lambda: next(left, None), written.append)
    return "".join(written)


def test_the_run_answers_and_stops(chat: Chat) -> None:
    written: list[str] = []
    assert chat.say(ASKED, written.append) == "green"
    assert "".join(written) == "green"
    assert chat.messages[-1] == {"role": "assistant", "content": "green"}


def test_base_and_adapter_can_be_switched(chat: Chat) -> None:
    said = conversation(chat, ASKED, "/base", ASKED, "/adapter", "/clear", ASKED, "/quit", "never")
    assert said.count("green") == 2
    assert "now base" in said
    assert "now adapter" in said
    assert chat.messages[-2]["content"] == ASKED


def test_starting_with_the_base(colour_run: Path) -> None:
    chat = open_chat(colour_run, ChatOptions(base=True, max_new_tokens=8))
    assert chat.arm == "base"
    assert chat.say(ASKED, lambda text: None) != "green"


def test_the_prompt_is_that_of_training(chat: Chat, colour_run: Path) -> None:
    chat.messages = [{"role": "user", "content": ASKED}]
    tokenizer = AutoTokenizer.from_pretrained(colour_run / "adapter")
    expected = tokenizer.apply_chat_template(
        chat.messages, add_generation_prompt=True, return_dict=False
    )
    assert chat._prompt() == list(expected)


def test_a_long_conversation_loses_its_oldest_turns(chat: Chat) -> None:
    for number in range(12):
        chat.say(f"{number} sky and sea and sky", lambda text: None)
    assert len(chat._prompt()) <= 256 - 16
    with pytest.raises(UsageError, match="the model takes 256"):
        chat.say("x" * 500, lambda text: None)
    assert "shorter" in conversation(chat, "x" * 500)


def test_unknown_commands_and_arms(chat: Chat, colour_run: Path) -> None:
    assert "/quit ends" in conversation(chat, "/what")
    single = open_chat(Path("bundled:tiny"), ChatOptions(max_new_tokens=4))
    assert "there is no adapter here" in conversation(single, "/adapter", "hello")


def test_a_temperature_samples(colour_run: Path) -> None:
    answers = set()
    for seed in range(4):
        options = ChatOptions(base=True, temperature=2.0, seed=seed, max_new_tokens=8)
        chat = open_chat(colour_run, options)
        answers.add(chat.say(ASKED, lambda text: None))
    assert len(answers) > 1
    torch.manual_seed(0)


def test_a_recipe_cannot_be_talked_to(colour_run: Path, tmp_path: Path) -> None:
    recipe = (colour_run / "recipe.yaml").read_text().replace(str(colour_run), str(tmp_path / "x"))
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe)
    with pytest.raises(UsageError, match="not trained yet"):
        open_chat(file, ChatOptions())
