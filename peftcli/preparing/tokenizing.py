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
from peftcli.preparing.offsets import token_range
from peftcli.preparing.work import MASKED, SHOWN, Batch, Form, Hashes, Work, joined
from peftcli.rendering.renderer import Rendered, Renderer
from peftcli.rendering.template import RenderError
from peftcli.rendering.time_limit import time_limit

# Encodings take some 150 bytes a token, so only so many characters are encoded at a time.
SLICE = 1 << 17
MAX_CHARACTERS = 4 << 20


@dataclass(slots=True)
class _Row:
    place: str
    rendered: Rendered
    group: bytes
    plain: bool


@dataclass(slots=True)
class _Kept:
    content: bytes
    """What makes it a duplicate of another row."""
    group: bytes
    ids: list[int]
    spans: list[tuple[int, int]]


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
        with time_limit():
            return self._batch(rows, form)

    def _batch(self, rows: Iterable[RawRow], form: Form) -> Batch:
        counts: Counter[str] = Counter()
        bad: list[str] = []
        parts: list[Batch] = []
        good: list[_Row] = []
        read = reader(form.name, form.columns, form.labels)
        size = 0
        for raw in rows:
            counts["read"] += 1
            row = self._row(raw, read)
            if isinstance(row, str):
                counts["bad"] += 1
                bad += [row] if len(bad) < SHOWN else []
                self.failed = self.work.stop_at_bad
            elif not self.failed:
                good.append(row)
                size += len(row.rendered.text)
            if size > SLICE:
                parts.append(self._tokens(good, counts))
                good, size = [], 0
        parts.append(self._tokens(good, counts))
        return joined(parts, counts, bad)

    def _row(self, raw: RawRow, read: Callable[[Row], Row]) -> _Row | str:
        place = raw.place
        if raw.value is None:
            return f"{place}: {raw.problem}"
        try:
            row = read(raw.value)
            if "text" in row:
                text = self._bare(row["text"])
                rendered = Rendered(text, [(0, len(text))])
                question = text.encode()
            else:
                messages = self._messages(row)
                rendered = self.render(messages, row.get("tools"))
                question = _question(messages, rendered.text)
        except (RowError, RenderError) as error:
            return f"{place}: {error}"
        if len(rendered.text) > MAX_CHARACTERS:
            return f"{place}: {len(rendered.text):,} characters in one row; split it into several"
        return _Row(place, rendered, question, "text" in row)

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
        kept: list[_Kept] = []
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
                if self.work.too_long in ("error", "drop"):
                    continue
                if row.plain and self.work.too_long != "truncate":
                    pieces = self._pieces(row, ids)
                    counts["split"] += 1
                    counts["pieces"] += len(pieces)
                    kept += pieces
                    continue
                ids = ids[: self.work.max_length]
                spans = [(a, min(b, len(ids))) for a, b in spans if a < len(ids)]
                if not spans:
                    counts["answer_cut"] += 1
                    continue
                counts["truncated"] += 1
            kept.append(_Kept(row.rendered.text.encode(), row.group, ids, spans))
        batch = _flat(kept, counts)
        batch.too_long = too_long[:SHOWN]
        batch.largest_id = int(batch.ids.max(initial=0))
        if self.work.unknown is not None:
            counts["unknown"] += int((batch.ids == self.work.unknown).sum())
        return batch

    def _pieces(self, row: _Row, ids: list[int]) -> list[_Kept]:
        """All of a long text in pieces; each begins as a text does, and the last one ends it."""
        begin = [self.work.begin[1]] if self.work.begin else []
        room = self.work.max_length - len(begin)
        pieces = []
        for start in range(len(begin), len(ids), room):
            piece = [*begin, *ids[start : start + room]]
            # Known by its tokens: hashing the whole text for each piece would be quadratic.
            content = np.array(piece, np.int32).tobytes()
            pieces.append(_Kept(content, row.group, piece, [(len(begin), len(piece))]))
        return pieces

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


def _question(messages: Sequence[Mapping[str, Any]], text: str) -> bytes:
    asked = [item["content"] for item in messages if item["role"] in ("user", "tool")]
    return ("\0".join(asked) if any(asked) else text).encode()


def _hashes(texts: Iterable[bytes], count: int) -> Hashes:
    digests = b"".join(blake2b(text, digest_size=8).digest() for text in texts)
    return np.frombuffer(digests, dtype=np.uint64, count=count)


def _flat(kept: Sequence[_Kept], counts: Counter[str]) -> Batch:
    lengths = np.fromiter((len(row.ids) for row in kept), np.int32, len(kept))
    total = int(lengths.sum())
    ids = np.fromiter(chain.from_iterable(row.ids for row in kept), np.int32, total)
    labels = np.full(total, MASKED, np.int32)
    trained = np.zeros(len(kept), np.int32)
    offset = 0
    for position, row in enumerate(kept):
        for start, end in row.spans:
            labels[offset + start : offset + end] = ids[offset + start : offset + end]
            trained[position] += end - start
        offset += len(row.ids)
    counts["kept"] += len(kept)
    counts["tokens"] += total
    contents = _hashes((row.content for row in kept), len(kept))
    groups = _hashes((row.group for row in kept), len(kept))
    return Batch(ids, labels, lengths, trained, contents, groups, counts)
