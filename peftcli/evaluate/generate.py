"""Greedy answers in batches: left padding, similar lengths together, keys and values cached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from peft import PeftModel
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from peftcli.evaluate.batches import each_batch, padded
from peftcli.evaluate.score import AnyModel, Ids
from peftcli.models import Device

CACHED_TOKENS = {"cuda": 65536, "cpu": 8192}
MOST_ROWS = {"cuda": 256, "cpu": 64}


@dataclass(frozen=True)
class Decoding:
    """How answers are written; always greedy."""

    max_new_tokens: int
    stops: tuple[int, ...]
    pad: int
    positions: int | None
    """The longest sequence the model was made for."""

    def room(self, prompt: int) -> int:
        """The most new tokens after a prompt of so many tokens."""
        if self.positions is None:
            return self.max_new_tokens
        return max(0, min(self.max_new_tokens, self.positions - prompt))


@dataclass(frozen=True)
class Answer:
    """Token ids before the first stop token."""

    ids: tuple[int, ...]
    stopped: bool
    """Whether the model ended the answer itself."""


@torch.inference_mode()
def write_answers(
    model: AnyModel,
    prompts: Sequence[Ids],
    decoding: Decoding,
    device: Device,
    done: Callable[[list[int], list[Answer]], None],
) -> None:
    """The greedy answer to every prompt, batch by batch."""
    own = plain_decoding(model)
    try:
        rooms = [decoding.room(len(prompt)) for prompt in prompts]
        order = sorted(range(len(prompts)), key=rooms.__getitem__)
        # Rows with less room than others get batches of their own, so that none overruns.
        for room, group in groupby(order, key=rooms.__getitem__):
            rows = list(group)
            if room == 0:
                done(rows, [Answer((), False)] * len(rows))
                continue
            lengths = [len(prompts[row]) + room for row in rows]

            def work(places: list[int], rows: list[int] = rows, room: int = room) -> None:
                some = [rows[place] for place in places]
                done(some, _answers(model, [prompts[row] for row in some], room, decoding))

            each_batch(lengths, CACHED_TOKENS[device.kind], work, MOST_ROWS[device.kind])
    finally:
        model.generation_config = own


def plain_decoding(model: AnyModel) -> GenerationConfig:
    """Take the model's own decoding defaults (penalties, sampling) away and return them."""
    own: GenerationConfig = model.generation_config
    model.generation_config = GenerationConfig()
    if isinstance(model, PeftModel):
        model.get_base_model().generation_config = model.generation_config
    return own


def greedy(new_tokens: int, stops: Sequence[int], pad: int) -> GenerationConfig:
    """Greedy decoding of at most, or without stops exactly, `new_tokens`."""
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=new_tokens,
        eos_token_id=list(stops) or None,
        pad_token_id=pad,
        use_cache=True,
    )


def _answers(model: AnyModel, prompts: list[Ids], room: int, decoding: Decoding) -> list[Answer]:
    ids, mask = padded(prompts, decoding.pad, model.device, left=True)
    written = model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=greedy(room, decoding.stops, decoding.pad),
    )
    return [_until_stop(row, decoding.stops) for row in written[:, ids.shape[1] :].tolist()]


def _until_stop(ids: list[int], stops: Sequence[int]) -> Answer:
    end = next((place for place, token in enumerate(ids) if token in stops), None)
    return Answer(tuple(ids[:end]), end is not None)


class Clock(StoppingCriteria):  # type: ignore[misc]
    """Notes the time of every token and never stops."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        self.times.append(self.now())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def timed(model: AnyModel, ids: torch.Tensor, new_tokens: int, now: Callable[[], float]) -> Clock:
    """Write exactly `new_tokens` after equally long prompts, (rows, length), and note the times."""
    clock = Clock(now)
    with torch.inference_mode():
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=greedy(new_tokens, (), 0),
            stopping_criteria=StoppingCriteriaList([clock]),
        )
    return clock
