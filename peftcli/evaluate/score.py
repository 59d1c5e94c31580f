"""Log-likelihoods: of the answers that stand in the rows, and of labels that could stand there."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TypeAlias

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from peftcli.evaluate.batches import each_batch, padded
from peftcli.preparing.work import MASKED

AnyModel: TypeAlias = PreTrainedModel | PeftModel
Ids = Sequence[int]


@dataclass(frozen=True)
class Loss:
    """What a model says of the trained tokens of one row."""

    nats: float
    tokens: int
    greedy: tuple[int, ...]
    """The token it would have written in each of their places."""


@torch.inference_mode()
def row_losses(
    model: AnyModel,
    ids: Sequence[Ids],
    labels: Sequence[Ids],
    *,
    tokens: int,
    done: Callable[[list[int], list[Loss]], None],
) -> None:
    """The loss of every row, batch by batch: the same sums as the trainer's evaluation."""

    def work(rows: list[int]) -> None:
        done(rows, _losses(model, [ids[row] for row in rows], [labels[row] for row in rows]))

    each_batch([len(row) for row in ids], tokens, work)


@torch.inference_mode()
def choice_log_likelihoods(
    model: AnyModel,
    prompts: Sequence[Ids],
    candidates: Sequence[Sequence[Ids]],
    *,
    tokens: int,
    done: Callable[[list[int], list[list[float]]], None],
) -> None:
    """The log-likelihood in nats of each row's candidates after its prompt.

    A prompt is read once; its keys and values are shared by its candidates.
    """

    def work(rows: list[int]) -> None:
        asked = [prompts[row] for row in rows], [candidates[row] for row in rows]
        score = _with_cache if _shares_cache(model) else _without_cache
        done(rows, score(model, *asked, tokens))

    # A pass holds every candidate of its rows, so that their number counts for the budget.
    lengths = [
        len(prompt) + sum(map(len, some)) for prompt, some in zip(prompts, candidates, strict=True)
    ]
    each_batch(lengths, tokens, work)


def _losses(model: AnyModel, ids: Sequence[Ids], labels: Sequence[Ids]) -> list[Loss]:
    inputs, mask = padded(ids, 0, model.device, left=False)
    targets, _ = padded(labels, MASKED, model.device, left=False)
    targets = targets.masked_fill(mask == 0, MASKED)[:, 1:]
    trained = targets != MASKED
    # From the end, because learned prompts stand before the row.
    logits = model(input_ids=inputs, attention_mask=mask, use_cache=False).logits
    chosen = logits[:, -inputs.shape[1] : -1][trained]
    nats, greedy = _scored(chosen, targets[trained])
    counts = trained.sum(1).tolist()
    parts = zip(torch.split(nats, counts), torch.split(greedy, counts), counts, strict=True)
    return [
        Loss(float(each.double().sum()), count, tuple(best.tolist())) for each, best, count in parts
    ]


def _scored(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats and best tokens, in float32 a piece at a time: (tokens, vocabulary) -> (tokens,)."""
    pieces = [
        (cross_entropy(some.float(), right, reduction="none"), some.argmax(-1))
        for some, right in zip(torch.split(logits, 1024), torch.split(targets, 1024), strict=True)
    ]
    return torch.cat([nats for nats, _ in pieces]), torch.cat([best for _, best in pieces])


def _shares_cache(model: AnyModel) -> bool:
    """Whether keys and values of a prompt can be repeated for its candidates."""
    learned = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
    return not learned and "past_key_values" in _forward_names(model)


def _forward_names(model: AnyModel) -> set[str]:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return set(inspect.signature(base.forward).parameters)


def _with_cache(
    model: AnyModel, prompts: Sequence[Ids], candidates: Sequence[Sequence[Ids]], tokens: int
) -> list[list[float]]:
    ids, mask = padded(prompts, 0, model.device, left=True)
    places = {"position_ids": _places(mask)} if "position_ids" in _forward_names(model) else {}
    read = model(input_ids=ids, attention_mask=mask, use_cache=True, **places)
    if not _repeats(read.past_key_values):
        return _without_cache(model, prompts, candidates, tokens)
    first = torch.log_softmax(read.logits[:, -1].float(), -1)
    pairs = [(row, tuple(one)) for row, some in enumerate(candidates) for one in some]
    step = max(1, tokens // (ids.shape[1] + max(len(one) for _, one in pairs)))
    found: list[float] = []
    for start in range(0, len(pairs), step):
        part = pairs[start : start + step]
        rows = torch.tensor([row for row, _ in part], device=model.device)
        answers, answered = padded([one for _, one in part], 0, model.device, left=False)
        scores = first[rows].gather(1, answers[:, :1])
        if answers.shape[1] > 1:
            cache = copy.deepcopy(read.past_key_values)
            cache.batch_select_indices(rows)
            both = torch.cat([mask[rows], answered], 1)
            places = {"position_ids": _places(both)[:, ids.shape[1] : -1]} if places else {}
            logits = model(
                input_ids=answers[:, :-1],
                attention_mask=both[:, :-1],
                past_key_values=cache,
                use_cache=True,
                **places,
            ).logits
            after = torch.log_softmax(logits.float(), -1).gather(2, answers[:, 1:, None])[..., 0]
            scores = torch.cat([scores, after * answered[:, 1:]], 1)
        found += scores.double().sum(1).tolist()
    return _grouped(found, candidates)


def _without_cache(
    model: AnyModel, prompts: Sequence[Ids], candidates: Sequence[Sequence[Ids]], tokens: int
) -> list[list[float]]:
    pairs = [(p, one) for p, some in zip(prompts, candidates, strict=True) for one in some]
    ids = [[*prompt, *one] for prompt, one in pairs]
    labels = [[MASKED] * len(prompt) + list(one) for prompt, one in pairs]
    found = [0.0] * len(ids)

    def work(rows: list[int]) -> None:
        scored = _losses(model, [ids[row] for row in rows], [labels[row] for row in rows])
        for row, loss in zip(rows, scored, strict=True):
            found[row] = -loss.nats

    each_batch([len(row) for row in ids], tokens, work)
    return _grouped(found, candidates)


def _repeats(cache: object) -> bool:
    """Whether rows of the cache can be chosen; the states of linear attention cannot."""
    return isinstance(cache, DynamicCache) and all(
        isinstance(layer, DynamicLayer) for layer in cache.layers
    )


def _places(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def _grouped(values: Sequence[float], candidates: Sequence[Sequence[Ids]]) -> list[list[float]]:
    ends = accumulate((len(some) for some in candidates), initial=0)
    return [list(values[start:end]) for start, end in pairwise(ends)]
