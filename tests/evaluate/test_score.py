"""Losses, likelihoods and answers of real tiny models, batched and one by one."""

from __future__ import annotations

import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import VOCABULARY, tiny_model
from transformers import PreTrainedModel

from peftcli.errors import ResourceError
from peftcli.evaluate.batches import each_batch
from peftcli.evaluate.generate import Answer, Decoding, write_answers
from peftcli.evaluate.score import Loss, choice_log_likelihoods, row_losses
from peftcli.models import Device
from peftcli.preparing.work import MASKED

CPU = Device("cpu", "float32", "CPU", None)
# Grouped heads, sliding windows, learned positions, ALiBi, experts, latent attention.
FAMILIES = ("llama", "gemma2", "opt", "bloom", "qwen3_moe", "deepseek_v2")
STOPS = (7, 9)


def prompts(rows: int = 9) -> list[list[int]]:
    draw = random.Random(0)
    return [
        [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(3, 40))] for _ in range(rows)
    ]


def log_likelihood(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> float:
    """The plainest way: one row, no cache, float64."""
    with torch.no_grad():
        scores = torch.log_softmax(model(torch.tensor([prompt + answer])).logits[0].double(), -1)
    places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return sum(float(scores[place, token]) for place, token in zip(places, answer, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_likelihoods_of_candidates(family: str) -> None:
    model, asked, draw = tiny_model(family), prompts(), random.Random(1)
    some = [
        [[draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, 5))] for _ in range(count)]
        for count in (2, 3, 4, 1, 2, 5, 2, 2, 3)
    ]
    found: dict[int, list[float]] = {}
    choice_log_likelihoods(
        model,
        asked,
        some,
        tokens=300,
        done=lambda rows, values: found.update(zip(rows, values, strict=True)),
    )
    for row, (prompt, candidates) in enumerate(zip(asked, some, strict=True)):
        expected = [log_likelihood(model, prompt, one) for one in candidates]
        assert found[row] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_in_batches_are_those_of_single_rows(family: str) -> None:
    model, asked = tiny_model(family), prompts()
    found: dict[int, Answer] = {}
    write_answers(
        model,
        asked,
        Decoding(12, STOPS, 0, 128),
        CPU,
        lambda rows, values: found.update(zip(rows, values, strict=True)),
    )
    for row, prompt in enumerate(asked):
        alone = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=list(STOPS),
            pad_token_id=0,
        )[0, len(prompt) :].tolist()
        end = next((i for i, token in enumerate(alone) if token in STOPS), None)
        assert found[row] == Answer(tuple(alone[:end]), end is not None)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_in_batches_are_those_of_single_rows(family: str) -> None:
    model, rows = tiny_model(family), prompts()
    labels = [[MASKED] * (len(row) // 2) + row[len(row) // 2 :] for row in rows]
    found: dict[int, Loss] = {}
    row_losses(
        model,
        rows,
        labels,
        tokens=90,
        done=lambda some, values: found.update(zip(some, values, strict=True)),
    )
    for number, (ids, right) in enumerate(zip(rows, labels, strict=True)):
        with torch.no_grad():
            alone = model(torch.tensor([ids]), labels=torch.tensor([right])).loss
        tokens = sum(label != MASKED for label in right[1:])
        assert found[number].tokens == tokens
        assert found[number].nats == pytest.approx(float(alone) * tokens, rel=1e-5)


def test_states_of_linear_attention_are_not_shared_between_candidates() -> None:
    model, candidates = tiny_model("nemotron_h"), [[5], [6, 7]]
    found: list[list[float]] = []
    choice_log_likelihoods(
        model, [[8, 9]], [candidates], tokens=64, done=lambda _, some: found.extend(some)
    )
    expected = [log_likelihood(model, [8, 9], one) for one in candidates]
    assert found[0] == pytest.approx(expected, abs=1e-4)


def test_the_first_token_of_a_text_is_predicted_by_nothing() -> None:
    model = tiny_model("llama")
    found: list[Loss] = []
    row_losses(model, [[5, 6, 7]], [[5, 6, 7]], tokens=64, done=lambda _, some: found.extend(some))
    assert found[0].tokens == len(found[0].greedy) == 2


def test_the_models_own_penalties_do_not_touch_the_answers() -> None:
    model, asked = tiny_model("llama"), prompts()
    plain = answers_of(model, asked)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.do_sample = True
    model.generation_config.temperature = 3.0
    assert answers_of(model, asked) == plain
    assert model.generation_config.repetition_penalty == 5.0


def test_the_adapter_is_switched_off_and_on_without_a_second_model() -> None:
    base = tiny_model("llama")
    before = answers_of(base, prompts())
    tuned = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    after = answers_of(tuned, prompts())
    with tuned.disable_adapter():
        assert answers_of(tuned, prompts()) == before
    assert answers_of(tuned, prompts()) == after != before


def test_a_row_near_the_end_of_the_positions_gets_what_room_there_is() -> None:
    model = tiny_model("opt")  # an index error beyond its 128 learned positions
    rows = [[5] * 120, [6] * 127, [7] * 128, [8] * 20]
    found = answers_of(model, rows, Decoding(30, (), 0, 128))
    assert [len(answer.ids) for answer in found] == [8, 1, 0, 30]


def test_batches_hold_their_budget_and_every_row_once() -> None:
    lengths = [random.Random(i).randint(1, 60) for i in range(100)]
    found: list[list[int]] = []
    each_batch(lengths, 128, found.append, most_rows=8)
    assert sorted(row for batch in found for row in batch) == list(range(100))
    assert all(len(batch) <= 8 for batch in found)
    assert all(len(batch) * max(lengths[row] for row in batch) <= 128 for batch in found)
    found.clear()
    each_batch([500], 128, found.append)
    assert found == [[0]]


def test_batches_shrink_when_memory_is_short_and_stay_small() -> None:
    done: list[list[int]] = []
    tries: list[int] = []

    def work(rows: list[int]) -> None:
        tries.append(len(rows))
        if len(rows) > 3:
            raise torch.cuda.OutOfMemoryError
        done.append(rows)

    each_batch([10] * 20, 160, work)
    assert sorted(row for batch in done for row in batch) == list(range(20))
    assert tries[:3] == [16, 8, 4]
    assert set(tries[3:]) == {2}

    def never(rows: list[int]) -> None:
        raise torch.cuda.OutOfMemoryError

    with pytest.raises(ResourceError, match="single row"):
        each_batch([10] * 4, 40, never)


def answers_of(
    model: PreTrainedModel, asked: list[list[int]], decoding: Decoding | None = None
) -> list[Answer]:
    found: dict[int, Answer] = {}
    write_answers(
        model,
        asked,
        decoding or Decoding(8, STOPS, 0, 128),
        CPU,
        lambda rows, values: found.update(zip(rows, values, strict=True)),
    )
    return [found[row] for row in range(len(asked))]
