"""Closed loops of streamed completions of a given length, and what they took. Bytes are read when the load is over."""

from __future__ import annotations

import asyncio
import gc
import re
import time
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, count, pairwise
from typing import Any, Final

import msgspec

from loadtests.vllm.stacks import MODEL, Stack

_USAGE: Final = re.compile(
    rb'"choices":\[\],"usage":\{"prompt_tokens":(\d+),"total_tokens":\d+,"completion_tokens":(\d+)'
)
_DONE: Final = b"data: [DONE]"
_END: Final = b"0\r\n\r\n"
_WORDS: Final = ("the", "old", "town", "boats", "question", "answer", "school", "window", "morning", "people", "prices")
_numbers = count(1)


class Shape(msgspec.Struct, frozen=True):
    """One load."""

    streams: int
    prompt_tokens: int
    tokens: int
    rounds: int


class Sample(msgspec.Struct):
    """What one load showed on one stack. Times in ms, CPU in microseconds."""

    tokens_per_s: float
    requests_per_s: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    itl_p50_ms: float
    """Between events; a stack that joins tokens has fewer and longer ones."""
    itl_p99_ms: float
    tokens_per_event: float
    front_us_per_token: float
    engine_us_per_token: float
    client_us_per_token: float
    errors: int


class _Answer:
    __slots__ = ("asked_at", "pieces", "times")

    def __init__(self) -> None:
        self.asked_at = time.perf_counter()
        self.pieces: list[bytes] = []
        self.times: list[float] = []


class _Stream(asyncio.Protocol):
    """One keep-alive connection."""

    def __init__(self) -> None:
        self._answer: _Answer | None = None
        self._done: asyncio.Future[None] | None = None
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        if answer is None or self._done is None:
            return
        answer.times.append(time.perf_counter())
        answer.pieces.append(data)
        # The end may come in two reads; not streamed is an error, which has a length and no such end.
        if data.endswith(_END) or b"".join(answer.pieces[-2:]).endswith(_END) or answer.pieces[0][9:12] != b"200":
            self._answer = None
            if not self._done.done():
                self._done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        if self._done is not None and not self._done.done():
            self._done.set_result(None)

    async def ask(self, body: bytes) -> _Answer:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        self._done = asyncio.get_running_loop().create_future()
        answer = self._answer = _Answer()
        self._transport.write(head.encode() + body)
        await self._done
        return answer

    def close(self) -> None:
        self._transport.abort()


async def words_for(stack: Stack, tokens: int) -> int:
    """How many words make a prompt of about so many tokens."""
    (answer,), _, _ = await _ask_all(stack, Shape(1, 0, 1, 1), 200, 60.0)
    return max(1, round(200 * tokens / _usage(answer)[0]))


async def run(stack: Stack, shape: Shape, words: int, limit_s: float) -> Sample:
    """Runs it. Raises `TimeoutError` where it takes longer than `limit_s`."""
    gc.collect()
    gc.disable()
    before = _cpu(stack)
    try:
        answers, seconds, client_s = await _ask_all(stack, shape, words, limit_s)
    finally:
        gc.enable()
    front, engine = (after - least for after, least in zip(_cpu(stack), before, strict=True))
    good = [answer for answer in answers if _is_whole(answer, shape.tokens)]
    if not good:
        raise RuntimeError(f"{stack.name} answered nothing: {b''.join(answers[0].pieces)[:400]!r}")
    tokens = shape.tokens * len(good)
    events = [_event_times(answer) for answer in good]
    ttft = [times[0] - answer.asked_at for times, answer in zip(events, good, strict=True)]
    gaps = [after - least for times in events for least, after in pairwise(times)] or [0.0]
    return Sample(
        tokens_per_s=tokens / seconds,
        requests_per_s=len(good) / seconds,
        ttft_p50_ms=1e3 * _percentile(ttft, 50),
        ttft_p99_ms=1e3 * _percentile(ttft, 99),
        itl_p50_ms=1e3 * _percentile(gaps, 50),
        itl_p99_ms=1e3 * _percentile(gaps, 99),
        tokens_per_event=tokens / sum(map(len, events)),
        front_us_per_token=1e6 * front / tokens,
        engine_us_per_token=1e6 * engine / tokens,
        client_us_per_token=1e6 * client_s / tokens,
        errors=len(answers) - len(good),
    )


async def _ask_all(stack: Stack, shape: Shape, words: int, limit_s: float) -> tuple[list[_Answer], float, float]:
    """The answers, how long they took, and the CPU time of this process meanwhile."""
    loop = asyncio.get_running_loop()
    streams = [(await loop.create_connection(_Stream, "127.0.0.1", stack.port))[1] for _ in range(shape.streams)]
    answers: list[_Answer] = []

    async def one(stream: _Stream) -> None:
        for _ in range(shape.rounds):
            if not stream.lost:
                answers.append(await stream.ask(_body(words, shape.tokens)))

    began, spent = time.perf_counter(), time.process_time()
    try:
        async with asyncio.timeout(limit_s):
            await asyncio.gather(*map(one, streams))
        return answers, time.perf_counter() - began, time.process_time() - spent
    finally:
        for stream in streams:
            stream.close()


def _body(words: int, tokens: int) -> bytes:
    """A request whose prompt differs from all others from its first word on."""
    number = next(_numbers)
    prompt = " ".join([str(number), *(_WORDS[(number * i + i * i) % len(_WORDS)] for i in range(1, words))])
    body: dict[str, Any] = {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return msgspec.json.encode(body)


def _usage(answer: _Answer) -> tuple[int, int]:
    found = _USAGE.search(b"".join(answer.pieces))
    return (int(found[1]), int(found[2])) if found else (1, 0)


def _is_whole(answer: _Answer, tokens: int) -> bool:
    return _DONE in b"".join(answer.pieces[-3:]) and _usage(answer)[1] == tokens


def _event_times(answer: _Answer) -> list[float]:
    """When each event with text came; the last two events have none."""
    raw, ends = b"".join(answer.pieces), list(accumulate(map(len, answer.pieces)))
    found = [answer.times[bisect_left(ends, match.end())] for match in re.finditer(rb"data: \{", raw)]
    return found[:-1]


def _percentile(values: Sequence[float], percent: int) -> float:
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, len(ranked) * percent // 100)]


def _cpu(stack: Stack) -> tuple[float, float]:
    """Seconds that front and engine processes have taken: the kernel's clocks of processes, all threads."""
    return sum(map(_process_s, stack.front_pids)), sum(map(_process_s, stack.engine_pids()))


def _process_s(pid: int) -> float:
    return time.clock_gettime(~pid << 3 | 2)
