"""Answers as they came over the wire, and what was in them.

Sans-IO. While a load runs only bytes and their times are kept; they are read here when it is over, so that reading them
disturbs nothing that is measured. A chunk is one event (gRPC: one message) with text in it. Tokens are counted in the
text itself: a router that joins two tokens into one event shows fewer chunks and the same tokens.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, Final, TypeAlias

import msgspec
from google.protobuf.message import DecodeError
from kvlane.v1 import inference_pb2 as pb


class Answer(msgspec.Struct):
    """One answer as it came; times in seconds on one clock."""

    asked_tokens: int
    asked_at: float = 0.0
    """When the request was written."""
    times: list[float] = []
    """When each piece came."""
    pieces: list[bytes] = []
    """What each read returned; over gRPC each DATA frame's part of it."""
    failure: str = ""
    """Why it is not whole; empty where nothing went wrong so far."""


Chunk: TypeAlias = tuple[float, int]
"""When it came, in seconds, and how many tokens it holds."""
Reader: TypeAlias = Callable[[Answer], list[Chunk]]
"""Takes an answer apart. Raises `ValueError` for one that is none."""


class Tally(msgspec.Struct):
    """What a load got."""

    requests: int = 0
    """Answered whole."""
    chunks: int = 0
    tokens: int = 0
    errors: int = 0
    """Requests that were not answered whole."""
    causes: Counter[str] = msgspec.field(default_factory=Counter)
    ttft_s: list[float] = []
    """From the request to the first chunk."""
    gaps_s: list[float] = []
    """Between tokens of one answer; 0 between those of one chunk."""
    seconds: float = 0.0
    """How long the load took."""
    wall_s: float = 0.0
    """The same, where `seconds` is only the part of it that counts."""
    cpu_s: float = 0.0
    """What the load generator took of its own CPU meanwhile."""


def tally(answers: Iterable[Answer], read: Reader, seconds: float, until: float | None = None) -> Tally:
    """Counts what came; with `until` only chunks and ends of answers up to that time."""
    total = Tally(seconds=seconds)
    for answer in answers:
        try:
            chunks = read(answer)
            _check(answer, chunks)
        except ValueError as error:
            total.errors += 1
            total.causes[str(error)] += 1
            continue
        total.ttft_s.append(chunks[0][0] - answer.asked_at)
        for (before, _), (after, _) in pairwise(chunks):
            total.gaps_s.append(after - before)
        total.gaps_s += [0.0] * sum(tokens - 1 for _, tokens in chunks)
        if until is not None:
            total.requests += chunks[-1][0] <= until
            chunks = [chunk for chunk in chunks if chunk[0] <= until]
        else:
            total.requests += 1
        total.chunks += len(chunks)
        total.tokens += sum(tokens for _, tokens in chunks)
    return total


def _check(answer: Answer, chunks: Sequence[Chunk]) -> None:
    got = sum(tokens for _, tokens in chunks)
    if got != answer.asked_tokens:
        raise ValueError(f"{got} of {answer.asked_tokens} tokens")


def read_grpc(answer: Answer) -> list[Chunk]:
    """The chunks of a `Generate` call; the message that tells only the route is none."""
    if answer.failure:
        raise ValueError(answer.failure)
    chunks = []
    for at, message in _messages(answer):
        try:
            words = len(pb.GenerateResponse.FromString(message).text.split())
        except DecodeError as error:
            raise ValueError("a message that is no GenerateResponse") from error
        if words:
            chunks.append((at, words))
    return chunks


def _messages(answer: Answer) -> Iterator[tuple[float, bytes]]:
    """Length-prefixed messages, each with when its last byte came."""
    raw, ends, at = b"".join(answer.pieces), list(accumulate(map(len, answer.pieces))), 0
    while at < len(raw):
        end = at + 5 + int.from_bytes(raw[at + 1 : at + 5], "big")
        if raw[at] or end > len(raw):
            raise ValueError("a message that is compressed, or not whole")
        yield answer.times[bisect_left(ends, end)], raw[at + 5 : end]
        at = end


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    error: Any = None


_decode: Final = msgspec.json.Decoder(_Event).decode
_DONE: Final = b"[DONE]"


def read_http(answer: Answer) -> list[Chunk]:
    """The chunks of a streamed completion or chat completion over HTTP/1.1."""
    if answer.failure:
        raise ValueError(answer.failure)
    raw, ends = b"".join(answer.pieces), list(accumulate(map(len, answer.pieces)))
    chunks, done = [], False
    for end, event in _events(_parts(raw)):
        if event == _DONE:
            done = True
            continue
        words = _words(event)
        if words:
            chunks.append((answer.times[bisect_left(ends, end)], words))
    if not done:
        raise ValueError("a stream without its end")
    return chunks


def _words(event: bytes) -> int:
    try:
        read = _decode(event)
    except msgspec.MsgspecError as error:
        raise ValueError("an event that is no JSON object of a completion") from error
    if read.error is not None:
        raise ValueError("an error event")
    texts = (choice.text or (choice.delta.content if choice.delta else "") or "" for choice in read.choices)
    return sum(len(text.split()) for text in texts)


def _parts(raw: bytes) -> Iterator[tuple[int, bytes]]:
    """The parts of a chunked body (RFC 9112, 7.1), each with where it begins in `raw`."""
    head, found, _ = raw.partition(b"\r\n\r\n")
    if not found or not head.startswith(b"HTTP/1.1 200"):
        raise ValueError(f"no answer but {head[:60].decode('latin-1')!r}")
    if b"transfer-encoding: chunked" not in head.lower():
        raise ValueError("an answer that is not streamed")
    at = len(head) + 4
    while True:
        line = raw.find(b"\r\n", at)
        if line < 0:
            raise ValueError("a body without its end")
        size = int(raw[at:line].partition(b";")[0], 16)
        if not size:
            return
        yield line + 2, raw[line + 2 : line + 2 + size]
        at = line + size + 4


def _events(parts: Iterable[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """The data of server-sent events, each with how many raw bytes there are up to its end; comments are none."""
    held = b""
    for begin, part in parts:
        *whole, rest = (held + part).split(b"\n\n")
        end = begin - len(held)
        for event in whole:
            end += len(event) + 2
            if event.startswith(b"data:"):
                yield end, event[5:].strip()
        held = rest
