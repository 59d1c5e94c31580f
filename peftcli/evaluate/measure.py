"""Every measurement of one arm, row by row, kept in records so that none is made twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peftcli import __version__
from peftcli.evaluate.arms import Group, Loaded, free_memory, load, switched
from peftcli.evaluate.batches import forward_tokens
from peftcli.evaluate.generate import CACHED_TOKENS, Answer, Decoding, write_answers
from peftcli.evaluate.progress import Progressed, Tell
from peftcli.evaluate.questions import Item
from peftcli.evaluate.records import Records
from peftcli.evaluate.result import Arm
from peftcli.evaluate.score import AnyModel, Ids, Loss, choice_log_likelihoods, row_losses
from peftcli.models import Device

Results = dict[str, Any]
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


class Lazy:
    """A group of arms whose weights are loaded at the first need."""

    def __init__(self, group: Group, device: Device) -> None:
        self.group = group
        self.device = device
        self._loaded: Loaded | None = None

    def get(self) -> Loaded:
        """The weights in memory."""
        if self._loaded is None:
            self._loaded = load(self.group, self.device)
        return self._loaded

    @property
    def loaded(self) -> Loaded | None:
        """The weights, if anything needed them."""
        return self._loaded

    def release(self) -> None:
        """Free the memory."""
        self._loaded = None
        free_memory()


@dataclass(frozen=True)
class Measuring:
    """How arms are measured."""

    device: Device
    folder: Path
    """Where records are kept."""
    fresh: bool
    batch_tokens: int | None
    tell: Tell

    def losses(self, lazy: Lazy, arm: Arm, items: Sequence[Item], what: str) -> Results:
        """Row key -> [nats, tokens, greedy tokens]."""

        def work(model: AnyModel, rows: Sequence[Item], keep: Callable[..., None]) -> None:
            vocabulary = int(model.config.get_text_config().vocab_size)
            tokens = forward_tokens(self.device, vocabulary, self.batch_tokens)
            ids, labels = [row.ids for row in rows], [row.labels for row in rows]
            row_losses(model, ids, labels, tokens=tokens, done=keep)

        plain: Callable[[Loss], Any] = lambda loss: [loss.nats, loss.tokens, loss.greedy]  # noqa: E731
        return self._measure(lazy, arm, items, {"stage": "loss"}, work, plain, what)

    def answers(
        self, lazy: Lazy, arm: Arm, items: Sequence[Item], decoding: Decoding, what: str
    ) -> Results:
        """Row key -> [answer tokens, whether the model stopped]."""

        def work(model: AnyModel, rows: Sequence[Item], keep: Callable[..., None]) -> None:
            write_answers(model, [row.prompt for row in rows], decoding, self.device, keep)

        plain: Callable[[Answer], Any] = lambda answer: [answer.ids, answer.stopped]  # noqa: E731
        decides = {"stage": "answer", "decoding": decoding}
        return self._measure(lazy, arm, items, decides, work, plain, what)

    def choices(
        self,
        lazy: Lazy,
        arm: Arm,
        items: Sequence[Item],
        candidates: Mapping[str, Sequence[Ids]] | Sequence[Ids],
        what: str,
    ) -> Results:
        """Row key -> the log-likelihood of each candidate."""

        def work(model: AnyModel, rows: Sequence[Item], keep: Callable[..., None]) -> None:
            some = [
                candidates[row.key] if isinstance(candidates, Mapping) else candidates
                for row in rows
            ]
            tokens = self.batch_tokens or CACHED_TOKENS[self.device.kind]
            choice_log_likelihoods(
                model, [row.prompt for row in rows], some, tokens=tokens, done=keep
            )

        decides = {"stage": "choice", "candidates": candidates}
        return self._measure(lazy, arm, items, decides, work, list, what)

    def _measure(
        self,
        lazy: Lazy,
        arm: Arm,
        items: Sequence[Item],
        decides: Mapping[str, Any],
        work: Callable[..., None],
        plain: Callable[[Any], Any],
        what: str,
    ) -> Results:
        records = Records(
            self.folder, {**decides, **self._arm(arm), "device": self.device}, fresh=self.fresh
        )
        by_key = {item.key: item for item in items}
        missing = [by_key[key] for key in records.missing(by_key)]
        keep = partial(self._keep, records, missing, plain, f"{arm.name}: {what}")
        try:
            if missing:
                with switched(lazy.get().model, arm.name) as model:
                    work(model, missing, keep)
        finally:
            records.close()
        return {key: records.found[key] for key in by_key}

    def _keep(
        self,
        records: Records,
        items: Sequence[Item],
        plain: Callable[[Any], Any],
        what: str,
        rows: list[int],
        results: Sequence[Any],
    ) -> None:
        records.add({items[i].key: plain(one) for i, one in zip(rows, results, strict=True)})
        done = sum(item.key in records.found for item in items)
        self.tell(Progressed(what, done, len(items)))

    def _arm(self, arm: Arm) -> dict[str, Any]:
        libraries = {name: version(name) for name in LIBRARIES}
        return {"arm": arm.identity, "what": arm.what, "peftcli": __version__, **libraries}
