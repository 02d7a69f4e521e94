"""Takes long lists and texts out of the beginning of a JSON body, slice by slice.

Pure: generators that yield after each slice. Rule: what is taken are whole items that stand in a row, or whole
characters; so what is left is JSON with a shorter list or text, and both together say what the body said.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from functools import lru_cache
from typing import Any, Final, TypeVar

import msgspec

from router.prefix.window import character_end

T = TypeVar("T")

SLICE_BYTES: Final = 32 << 10
_MOST_BYTES: Final = 256 << 10
"""Of a slice in which the end of an item is looked for."""
_TRIES: Final = 4
"""To find where the last whole item of a slice ends, and where the field stands."""
_SLACK: Final = 64
"""Bytes behind the limit that are kept, so that a body that is too long is seen to be."""
_CLOSING: Final = bytes.maketrans(b"[", b"]")
_SPACE: Final = b" \t\n\r"


class _Skipped(msgspec.Struct, array_like=True):
    """Any list; its items are only skipped."""


_skipped: Final = msgspec.json.Decoder(_Skipped)


class Place(msgspec.Struct):
    """Where the content of a field begins."""

    at: int
    opening: bytes
    """The brackets before it, and the quote."""
    closing: bytes
    before: Any
    """What the body says that ends there."""


def find(
    body: bytes, field: str, decoder: msgspec.json.Decoder[Any], limit: int
) -> Generator[None, None, Place | None]:
    """The list, or the text, in the body's own `field`; None where that is neither, or not within `limit`.

    Yields after each try, which reads all that stands before the place.
    """
    pattern, at = _pattern(field), 0
    for _ in range(_TRIES):
        match = pattern.search(body, at, limit)
        if match is None:
            break
        opening = match[1].translate(None, _SPACE)
        closing = opening.translate(_CLOSING)[::-1] + b"}"
        at = match.end()
        try:
            before = decoder.decode(body[:at] + closing)
        except msgspec.DecodeError:
            yield
            continue
        yield
        return Place(at, opening, closing, before)
    return None


@lru_cache(maxsize=8)
def _pattern(field: str) -> re.Pattern[bytes]:
    return re.compile(rb'"%b"\s{0,8}:\s{0,8}((?:\[\s{0,8}){0,2}"?)' % field.encode())


class Taken:
    """What is taken out of `body`, from `start` on and not beyond `stop`; of the body, `limit` bytes are read."""

    def __init__(self, body: bytes, start: int, stop: int, limit: int) -> None:
        self.at = start
        """Up to where it is taken out."""
        self.ended = False
        """All of it was."""
        self._body = body
        self._start = start
        self._stop = max(start, min(stop, limit, len(body)))  # `stop` may be negative where `limit` is small.
        self._limit = limit

    def items(self, decoder: msgspec.json.Decoder[T], mark: bytes = b"},") -> Generator[None, None, T | None]:
        """The next items of a list, which end as `mark` says; None where whole ones are not found."""
        body, size, tries = self._body, SLICE_BYTES, _TRIES
        while size <= _MOST_BYTES:
            end = min(self.at + size, self._stop)
            for _ in range(tries):
                place = body.rfind(mark, self.at, end)
                if place < 0:
                    break
                end = place + 1
                items = _decoded(decoder, body[self.at : end])
                yield
                if items is not None:
                    self.at = place + len(mark)
                    return items
            if self.at + size >= self._stop:
                break
            size, tries = 2 * size, 1
        return None

    def skip_lists(self) -> Generator[None, None, None]:
        """The items of a list of lists, as far as they are found."""
        while (yield from self.items(_skipped, b"],")) is not None:
            pass

    def numbers(self, decoder: msgspec.json.Decoder[T]) -> Generator[None, None, T | None]:
        """The next of a list of numbers; None behind the last. Raises `msgspec.DecodeError`."""
        body, at = self._body, self.at
        end = min(at + SLICE_BYTES, self._stop)
        close = body.find(b"]", at, end)
        self.ended = close == at
        cut = close if close >= 0 else body.rfind(b",", at, end)
        if self.ended or (cut < 0 and end == self._limit):
            return None
        if cut < 0:
            raise msgspec.DecodeError("a list of numbers without an end")
        items = decoder.decode(b"[%b]" % body[at:cut])
        self.at = cut + (close < 0)
        yield
        return items

    def text(self, decoder: msgspec.json.Decoder[str]) -> Generator[None, None, str | None]:
        """More of a text; None behind its last character. Raises `msgspec.DecodeError`."""
        size = min(SLICE_BYTES, self._stop - self.at)
        piece = self._body[self.at : self.at + size + _SLACK]
        plain = piece.replace(b"\\\\", b"__").replace(b'\\"', b"__") if b"\\" in piece else piece
        cut = plain.find(b'"', 0, size)
        if cut < 0 and len(piece) > size:
            cut = character_end(piece, size)
        self.ended = self._body.startswith(b'"', self.at)
        if self.ended or (cut <= 0 and self.at + 2 * _SLACK > self._limit):
            return None
        if cut <= 0:
            raise msgspec.DecodeError("a text without an end")
        text = decoder.decode(b'"%b"' % piece[:cut])
        self.at += cut
        yield
        return text

    def left(self) -> tuple[bytes, int, int]:
        """The body without what was taken, how much of it is to be read, and how many bytes it lacks at the end."""
        end = min(len(self._body), self._limit + _SLACK)
        rest = self._body[: self._start] + self._body[self.at : end]
        return rest, self._limit - (self.at - self._start), len(self._body) - end


def _decoded(decoder: msgspec.json.Decoder[T], block: bytes) -> T | None:
    try:
        return decoder.decode(b"[%b]" % block)
    except (msgspec.DecodeError, RecursionError):
        return None
