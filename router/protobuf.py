"""Serialized protobuf messages taken apart in slices, between which the event loop runs.

Sans-IO. Rule: a slice is a run of whole fields, so it is a message of the same kind itself, and all of them, merged in
order, are the message. A field that is too long for a slice is given by its place, for those who know what is in it to
take apart further.
"""

from __future__ import annotations

import codecs
from collections.abc import Generator, Iterator
from typing import Final

LARGE_BYTES: Final = 64 << 10
"""A message from which on this is worth it: protobuf was measured to take up to 80 ns for a byte of tiny fields."""
SLICE_BYTES: Final = 32 << 10
SLICE_FIELDS: Final = 512
_SHORT: Final = 0x7F
_LONG: Final = 16 << 10
"""Fields that are longer stand alone."""
_TEXT_SLICE_BYTES: Final = 128 << 10  # For checks at memory speed.

_VARINT, _FIXED_64, _SIZED, _FIXED_32 = 0, 1, 2, 5
_MORE: Final = 0x80
_HEAD_BITS: Final = 32
"""Of a tag or a length, in at most five bytes."""
_MAX_NUMBER: Final = (1 << 29) - 1

Slice = tuple[int, int, int]
"""A field's number, and where its content begins and ends; 0 for a run of fields."""


class Malformed(ValueError):
    """These bytes are no protobuf message."""


class TooManyFields(ValueError):
    """More fields than an `Allowance` has."""


class Allowance:
    """How many fields a message may have, with those of its long fields."""

    __slots__ = ("_left",)

    def __init__(self, fields: int) -> None:
        self._left = fields

    def spend(self, fields: int) -> None:
        """Raises `TooManyFields` where there are not so many left."""
        self._left -= fields
        if self._left < 0:
            raise TooManyFields


def slices(body: bytes, at: int, end: int, allowance: Allowance | None = None) -> Iterator[Slice]:
    """The fields of the message that stands from `at` to `end`, in order.

    Raises `Malformed`, also for groups, which proto3 does not have, and `TooManyFields` where they exceed `allowance`.
    """
    run, until, left = at, at + SLICE_BYTES, SLICE_FIELDS
    while at < end:
        begin, tag = at, body[at]
        if tag & 0x87 == _SIZED and (size := body[at + 1] if at + 1 < end else _MORE) <= _SHORT:
            at += 2 + size  # As most are: a tag and a length of one byte each.
        else:
            tag, at = _varint(body, at, end, _HEAD_BITS)
            kind = tag & 7
            if kind == _SIZED:
                size, at = _varint(body, at, end, _HEAD_BITS)
                if _LONG < size <= end - at:
                    if not 0 < tag >> 3 <= _MAX_NUMBER:  # That of a short field is judged with its run.
                        raise Malformed(f"a field with the number {tag >> 3}")
                    if allowance is not None:
                        allowance.spend(SLICE_FIELDS - left + 1)
                    if run < begin:
                        yield 0, run, begin
                    yield tag >> 3, at, at + size
                    run = at = at + size
                    until, left = at + SLICE_BYTES, SLICE_FIELDS
                    continue
                at += size
            elif kind == _VARINT:
                _, at = _varint(body, at, end)
            elif kind == _FIXED_32:
                at += 4
            elif kind == _FIXED_64:
                at += 8
            else:
                raise Malformed(f"a field of the unknown kind {kind}")
        left -= 1
        if (at >= until or not left) and at <= end:
            if allowance is not None:
                allowance.spend(SLICE_FIELDS - left)
            yield 0, run, at
            run, until, left = at, at + SLICE_BYTES, SLICE_FIELDS
    if at > end:
        raise Malformed("a field that ends behind its message")
    if run < end:
        if allowance is not None:
            allowance.spend(SLICE_FIELDS - left)
        yield 0, run, end


def _varint(body: bytes, at: int, end: int, bits: int = 64) -> tuple[int, int]:
    """The number of at most about `bits` that begins at `at`, and where it ends."""
    value = shift = 0
    while at < end and shift < bits:
        byte = body[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < _MORE:
            return value, at
        shift += 7
    raise Malformed("a number without an end")


def sized(number: int, content: bytes) -> bytes:
    """A field with a content of some length; `number` is at most 15."""
    head = bytearray([number << 3 | _SIZED])
    size = len(content)
    while size >= _MORE:
        head.append(size & 0x7F | _MORE)
        size >>= 7
    head.append(size)
    return bytes(head) + content


def packed(body: bytes, at: int, end: int) -> Iterator[bytes]:
    """A long field of packed numbers in pieces of whole numbers. Raises `Malformed`."""
    while at < end:
        stop = min(end, at + _LONG)
        while body[stop - 1] >= _MORE:
            stop -= 1
            if stop == at:
                raise Malformed("a number without an end")
        yield body[at:stop]
        at = stop


def check_text(body: bytes, at: int, end: int) -> Generator[None, None, None]:
    """Whether that is UTF-8, slice by slice. Raises `Malformed`."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(at, end, _TEXT_SLICE_BYTES):
        stop = min(end, start + _TEXT_SLICE_BYTES)
        piece = body[start:stop]
        try:
            if stop == end or decoder.getstate()[0] or not piece.isascii():
                decoder.decode(piece, final=stop == end)
        except UnicodeDecodeError as error:
            raise Malformed("a text that is not UTF-8") from error
        yield
