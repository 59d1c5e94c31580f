"""Raw rows -> token ids and labels; the work of one process, which imports neither torch nor
transformers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from typing import Any

import numpy as np  # noqa: TID253 - this file is heavy
from tokenizers import Encoding, Tokenizer  # noqa: TID253

from peftcli.data.formats import Row, reader
from peftcli.data.messages import RowError
from peftcli.data.rows import RawRow
from peftcli.preparing.work import MASKED, SHOWN, Batch, Form, Hashes, Work
from peftcli.rendering.renderer import Rendered, Renderer
from peftcli.rendering.sandbox import time_limit
from peftcli.rendering.template import RenderError


@dataclass(slots=True)
class _Row:
    place: str
    rendered: Rendered
    group: bytes
    plain: bool


class Tokenizing:
    """Turns batches of rows into tokens; made once in each process."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.tokenizer: Tokenizer = Tokenizer.from_str(work.tokenizer)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.render = Renderer(work.template, work.turns, work.added, work.train_on)
        self.failed = False

    def __call__(self, rows: Iterable[RawRow], form: Form) -> Batch:
        """Check, render, tokenise and mask `rows`; what is wrong with a row is in the batch."""
        counts: Counter[str] = Counter()
        bad: list[str] = []
        good: list[_Row] = []
        read = reader(form.name, form.columns, form.labels)
        with time_limit():
            for raw in rows:
                counts["read"] += 1
                row = self._row(raw, read)
                if isinstance(row, str):
                    counts["bad"] += 1
                    bad += [row] if len(bad) < SHOWN else []
                    self.failed = self.work.stop_at_bad
                elif not self.failed:
                    good.append(row)
        batch = self._tokens(good, counts)
        batch.bad = bad
        return batch

    def _row(self, raw: RawRow, read: Callable[[Row], Row]) -> _Row | str:
        place = raw.place
        if raw.value is None:
            return f"{place}: {raw.problem}"
        try:
            row = read(raw.value)
            if "text" in row:
                text = self._bare(row["text"])
                rendered = Rendered(text, [(0, len(text))])
                return _Row(place, rendered, text.encode(), True)
            messages = self._messages(row)
            rendered = self.render(messages, row.get("tools"))
        except (RowError, RenderError) as error:
            return f"{place}: {error}"
        return _Row(place, rendered, _question(messages, rendered.text), False)

    def _messages(self, row: Row) -> list[Mapping[str, Any]]:
        messages = row.get("messages")
        if messages is None:
            messages = [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
        if self.work.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.work.system}, *messages]
        return messages

    def _bare(self, text: str) -> str:
        """Text without the begin and end tokens that tokenising adds."""
        if self.work.begin:
            text = text.removeprefix(self.work.begin[0])
        return text.removesuffix(self.work.end[0])

    def _tokens(self, rows: Sequence[_Row], counts: Counter[str]) -> Batch:
        texts = [row.rendered.text for row in rows]
        encodings = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        kept: list[tuple[_Row, list[int], list[tuple[int, int]]]] = []
        too_long: list[str] = []
        for row, encoding in zip(rows, encodings, strict=True):
            ids, spans = self._labelled(row, encoding)
            counts["controls"] += row.rendered.controls > 0
            counts["lost"] += row.rendered.lost
            if not spans:
                counts["untrained"] += 1
                continue
            if len(ids) > self.work.max_length:
                counts["too_long"] += 1
                if self.work.too_long == "error":
                    too_long.append(f"{row.place}: {len(ids)} tokens")
                if self.work.too_long != "truncate":
                    continue
                ids = ids[: self.work.max_length]
                spans = [(a, min(b, len(ids))) for a, b in spans if a < len(ids)]
                if not spans:
                    counts["answer_cut"] += 1
                    continue
                counts["truncated"] += 1
            kept.append((row, ids, spans))
        batch = _flat(kept, counts)
        batch.too_long = too_long[:SHOWN]
        if self.work.unknown is not None:
            counts["unknown"] += int((batch.ids == self.work.unknown).sum())
        return batch

    def _labelled(self, row: _Row, encoding: Encoding) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a row, and the ranges of them that carry loss."""
        ids: list[int] = encoding.ids
        if not row.plain:
            length = len(row.rendered.text)
            spans = [token_range(encoding, span, len(ids), length) for span in row.rendered.spans]
            return ids, [(start, end) for start, end in spans if start < end]
        begin = [self.work.begin[1]] if self.work.begin else []
        ids = [*begin, *ids, self.work.end[1]]
        return ids, [(len(begin), len(ids))]


def token_range(
    encoding: Encoding, span: tuple[int, int], count: int, length: int
) -> tuple[int, int]:
    """The tokens, of `count`, that hold a character of `span` in a text of `length`."""
    first = _token_at(encoding, span[0], length)
    if first is None:
        return count, count
    last = _token_at(encoding, span[1], length)
    if last is None:
        return first, count
    characters = encoding.token_to_chars(last)
    straddles = characters is not None and characters[0] < span[1]
    return first, last + straddles


def _token_at(encoding: Encoding, position: int, length: int) -> int | None:
    """The token of the first character from `position` on that any token holds."""
    while position < length:
        token: int | None = encoding.char_to_token(position)
        if token is not None:
            return token
        position += 1
    return None


def _question(messages: Sequence[Mapping[str, Any]], text: str) -> bytes:
    asked = [item["content"] for item in messages if item["role"] in ("user", "tool")]
    return ("\0".join(asked) if any(asked) else text).encode()


def _hashes(texts: Iterable[bytes], count: int) -> Hashes:
    digests = b"".join(blake2b(text, digest_size=8).digest() for text in texts)
    return np.frombuffer(digests, dtype=np.uint64, count=count)


def _flat(
    kept: Sequence[tuple[_Row, list[int], list[tuple[int, int]]]], counts: Counter[str]
) -> Batch:
    lengths = np.fromiter((len(ids) for _, ids, _ in kept), np.int32, len(kept))
    total = int(lengths.sum())
    ids = np.fromiter(chain.from_iterable(ids for _, ids, _ in kept), np.int32, total)
    labels = np.full(total, MASKED, np.int32)
    trained = np.zeros(len(kept), np.int32)
    offset = 0
    for position, (_, row_ids, spans) in enumerate(kept):
        for start, end in spans:
            labels[offset + start : offset + end] = ids[offset + start : offset + end]
            trained[position] += end - start
        offset += len(row_ids)
    counts["kept"] += len(kept)
    counts["tokens"] += total
    contents = _hashes((row.rendered.text.encode() for row, _, _ in kept), len(kept))
    groups = _hashes((row.group for row, _, _ in kept), len(kept))
    return Batch(ids, labels, lengths, trained, contents, groups, counts)
