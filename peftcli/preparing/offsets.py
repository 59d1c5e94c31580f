"""Characters of a text -> tokens of its encoding."""

from __future__ import annotations

from tokenizers import Encoding  # noqa: TID253 - this file is heavy


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
