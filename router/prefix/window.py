"""How much of a long body is read: its media by hash alone, and of the rest only the beginning.

Pure functions on bytes. The rule: reading costs no more than `limit` bytes of JSON do, however long the body and
whatever is in it; only byte searches and hashes that run at memory speed go beyond.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from typing import Final, TypeVar

import msgspec
import xxhash

from router.prefix.draft import MEDIA_STAND_IN, media_hash, media_start

T = TypeVar("T")

STRIDE: Final = 64 << 10
"""Media of twice this length are found for sure."""
LARGE_BYTES: Final = 2 * STRIDE
"""A body up to this length is read as it is."""
_HASHED_BYTES: Final = 512 << 10
"""Of one slice; about a tenth of a millisecond."""
_PROBE: Final = 64
_BASE64: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=-_"
_KEY: Final = re.compile(rb'"(?:url|data|image_url|image_embeds|audio_embeds|video_embeds)"\s{0,8}:\s{0,8}\Z')
_KEY_BYTES: Final = 40
_OBJECTS: Final = ((b'"role"', b"]}"), (b'"type"', b"]}]}"))
"""How messages and parts of contents begin, and what completes a body whose last one is cut away."""
_NUMERIC: Final = b"0123456789-, \n"
_ESCAPE_BYTES: Final = 12
"""Two \\u escapes make one character at most."""
_PAIR: Final = re.compile(rb"\\u[dD][89abAB]..\\u[dD][c-fC-F]")


def decode(decoder: msgspec.json.Decoder[T], body: bytes, limit: int, ends: tuple[bytes, ...]) -> tuple[T, int]:
    """What `body` says, and how many of its bytes were not read.

    Where it is longer than `limit` without its media, only its first `limit` bytes are read, completed by one of
    `ends`. Raises `msgspec.MsgspecError`.
    """
    if len(body) <= LARGE_BYTES:
        return decoder.decode(body), 0
    return drained(decode_plain(decoder, without_media(body), limit, ends))


def decode_plain(
    decoder: msgspec.json.Decoder[T], body: bytes, limit: int, ends: tuple[bytes, ...]
) -> Generator[None, None, tuple[T, int]]:
    """The same of a body without long media; yields after each try."""
    if len(body) <= limit:
        return decoder.decode(body), 0
    for head in _heads(body, limit, ends):
        try:
            return decoder.decode(head), len(body) - len(head)
        except msgspec.DecodeError:
            yield
    raise msgspec.DecodeError("no beginning of the body can be read")


def drained(slices: Generator[None, None, T]) -> T:
    """What the generator returns, at once."""
    try:
        while True:
            next(slices)
    except StopIteration as end:
        result: T = end.value
        return result


def without_media(body: bytes) -> bytes:
    """`body` with a hash in the place of long base64 strings that are media by their key."""
    return drained(media_cut_out(body))


def media_cut_out(body: bytes) -> Generator[None, None, bytes]:
    """The same in slices, between which others may run."""
    kept: list[bytes] = []
    done = seen = 0
    position = STRIDE
    while position < len(body):
        if position - seen > _HASHED_BYTES:
            seen = position
            yield
        if body[position : position + _PROBE].strip(_BASE64):
            position += STRIDE
            continue
        start = body.rfind(b'"', done, position)
        end = body.find(b'"', position)
        if end < 0:
            break
        if start >= 0 and _is_media(body, start, end):
            content = memoryview(body)[start + 1 : end]
            digest = yield from _hashed(content)
            kept += (body[done : start + 1], MEDIA_STAND_IN, digest.hex().encode())
            done = end
        position = max(end, position) + STRIDE
    if not kept:
        return body
    kept.append(body[done:])
    return b"".join(kept)


def _hashed(content: memoryview) -> Generator[None, None, bytes]:
    """`media_hash` in slices."""
    start = media_start(content)
    if start < 0:
        return media_hash(content)
    hashed = xxhash.xxh3_128()
    for at in range(start, len(content), _HASHED_BYTES):
        hashed.update(content[at : at + _HASHED_BYTES])
        yield
    return hashed.digest()


def _is_media(body: bytes, start: int, end: int) -> bool:
    """Whether these two quotes are around a long string without escapes that is media by its key."""
    if end - start < STRIDE or body.find(b"\\", start, end) >= 0:
        return False
    return _KEY.search(body[max(0, start - _KEY_BYTES) : start]) is not None


def _heads(body: bytes, limit: int, ends: tuple[bytes, ...]) -> Iterator[bytes]:
    """Beginnings of `body` made whole, the likeliest first: cut between objects, within a string, between numbers."""
    view, near = memoryview(body), max(0, limit - STRIDE)
    for key, end in _OBJECTS:
        place = _object_end(body, near, limit, key)
        if place > near:
            yield b"".join((view[:place], end))
    cut = character_end(body, limit)
    comma = max(body.rfind(b",", 0, limit), 0)
    numbers = not body[max(0, cut - _PROBE) : cut].strip(_NUMERIC)
    for end in ends:
        within_text = end.startswith(b'"')
        if not (within_text and numbers):
            yield b"".join((view[: cut if within_text else comma], end))
    for key, end in _OBJECTS:
        place = _object_end(body, 0, limit, key)
        if 0 < place <= near:
            yield b"".join((view[:place], end))


def _object_end(body: bytes, first: int, limit: int, key: bytes) -> int:
    """Where the objects end before the last one that begins with `key` from `first` to `limit`; 0 where that is not
    seen."""
    named = max(body.rfind(key, first, limit), 0)
    start = max(body.rfind(b"{", 0, named), 0)
    if not start or body[start + 1 : named].strip():
        return 0
    begin = max(0, start - _PROBE)
    before = body[begin:start].rstrip()
    return begin + len(before.removesuffix(b",")) if before.endswith((b",", b"[")) else 0


def character_end(body: bytes, limit: int) -> int:
    """The last place up to `limit` that is inside no escape and no character."""
    cut = limit
    escape = body.find(b"\\", max(0, cut - _ESCAPE_BYTES), cut)
    if escape >= 0:
        cut = len(body[:escape].rstrip(b"\\"))
        first = cut - _ESCAPE_BYTES // 2
        if first >= 0 and _PAIR.match(body, first):
            cut = len(body[:first].rstrip(b"\\"))
    while cut > 0 and body[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut
