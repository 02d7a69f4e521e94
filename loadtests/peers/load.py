"""The load: closed loops of streams, and requests that come at given times, over HTTP or gRPC.

A caller asks one request at a time and returns the answer as it came; nothing is read in it until the load is over
(`loadtests.peers.answers`). Loads end in time: what is not answered by then is an error.
"""

from __future__ import annotations

import asyncio
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from itertools import count
from typing import Final, Protocol

import msgspec

from loadtests.peers.answers import Answer, Chunk, Tally, tally
from loadtests.processes import MODEL

MAX_STREAMS: Final = 1000
GOLDEN: Final = (math.sqrt(5) - 1) / 2
_encode: Final = msgspec.json.Encoder().encode


class Prompts:
    """Prompts of one size; each differs from all others from its first word on, unless `repeated`."""

    def __init__(self, kilobytes: float, *, repeated: bool = False) -> None:
        words = "is what this prompt begins with, and these are words that it goes on with; "
        length = max(0, int(kilobytes * 1024) - 13)
        self._rest = " " + (words * (length // len(words) + 1))[:length]
        self._numbers: Iterator[int] = count()
        self._repeated = repeated

    def next(self, stream: int) -> str:
        """For a stream's next request."""
        return f"{stream if self._repeated else next(self._numbers):012d}{self._rest}"


class Due(msgspec.Struct, frozen=True):
    """A request of an open loop."""

    at_s: float
    """From the load's beginning."""
    tokens: int
    prompt: Callable[[], str]


class Caller(Protocol):
    """One stream: asks one request after the other."""

    async def ask(self, prompt: str, tokens: int) -> Answer:
        """The answer, whole or with its failure. Cancelled, it leaves nothing open."""


class Client(Protocol):
    """Makes callers, and knows how their answers are read."""

    def read(self, answer: Answer, /) -> list[Chunk]:
        """As a `Reader`."""

    def callers(self, streams: int) -> AbstractAsyncContextManager[list[Caller]]:
        """So many of them, closed on the way out."""


class HttpCaller(asyncio.Protocol):
    """One keep-alive connection, opened again where it was lost."""

    def __init__(self, port: int, model: str = MODEL) -> None:
        self._port = port
        self._model = model
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._done: asyncio.Future[None] | None = None

    async def ask(self, prompt: str, tokens: int) -> Answer:
        loop = asyncio.get_running_loop()
        answer = Answer(tokens)
        if self._transport is None:
            try:
                await loop.create_connection(lambda: self, "127.0.0.1", self._port)
            except OSError as error:
                answer.failure = f"no connection: {error.strerror}"
                return answer
        assert self._transport is not None
        request = http_request(prompt, tokens, self._model)
        self._answer, self._done = answer, loop.create_future()
        answer.asked_at = time.perf_counter()
        self._transport.write(request)
        try:
            await self._done
        except asyncio.CancelledError:
            self.close()
            raise
        return answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        if answer is None:
            return  # More than was asked for; whatever it is, it is no part of an answer.
        answer.times.append(time.perf_counter())
        answer.pieces.append(data)
        if data.endswith(b"0\r\n\r\n") or (len(data) < 5 and b"".join(answer.pieces[-5:]).endswith(b"\n0\r\n\r\n")):
            self._finish()
        elif len(answer.pieces) == 1 and not data.startswith(b"HTTP/1.1 200"):
            answer.failure = data.partition(b"\r\n")[0].decode("latin-1")
            self.close()  # Its body would have to be read by its length.
            self._finish()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._answer is not None:
            self._answer.failure = self._answer.failure or "the connection was lost"
            self._finish()

    def _finish(self) -> None:
        self._answer = None
        assert self._done is not None
        if not self._done.done():
            self._done.set_result(None)


def http_request(prompt: str, tokens: int, model: str = MODEL) -> bytes:
    """A streamed completion."""
    body = _encode({"model": model, "prompt": prompt, "max_tokens": tokens, "stream": True})
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def closed_loop(
    client: Client, streams: int, tokens: int, prompts: Prompts, *, rounds: int, limit_s: float
) -> Tally:
    """Each stream asks `rounds` times, the next request as soon as the last answer is whole."""
    return await _closed(client, streams, tokens, prompts, limit_s, rounds=rounds)


async def saturation(
    client: Client, streams: int, tokens: int, prompts: Prompts, *, seconds: float, limit_s: float
) -> Tally:
    """Each stream asks on for `seconds`; only what came within them counts."""
    return await _closed(client, streams, tokens, prompts, limit_s, seconds=seconds)


async def _closed(
    client: Client,
    streams: int,
    tokens: int,
    prompts: Prompts,
    limit_s: float,
    *,
    rounds: float = math.inf,
    seconds: float | None = None,
) -> Tally:
    """Of each stream `rounds` requests, or those that it begins in `seconds`."""
    answers: list[Answer] = []

    async def stream(number: int, caller: Caller) -> None:
        done = 0
        while done < rounds and (until is None or time.perf_counter() < until):
            answers.append(await caller.ask(prompts.next(number), tokens))
            done += 1

    async with client.callers(streams) as callers:
        with _undisturbed() as spent:
            began = time.perf_counter()  # A collection before it may take as long as a short load.
            until = None if seconds is None else began + seconds
            late = await _finish(
                [asyncio.ensure_future(stream(number, caller)) for number, caller in enumerate(callers)], limit_s
            )
            ended, cpu_s = time.perf_counter(), spent()
    answers += [Answer(tokens, failure=f"not answered within {limit_s:g} s")] * late
    total = tally(answers, client.read, ended - began if seconds is None else seconds, until)
    total.cpu_s, total.wall_s = cpu_s, ended - began
    return total


async def arrivals(
    client: Client, rate: float, total: int, most: int, tokens: int, prompts: Prompts, *, limit_s: float
) -> Tally:
    """`total` requests that come `rate` to the second, whether or not those before were answered.

    The times between them differ by a low-discrepancy sequence, so that they fall evenly into the steps of an engine:
    those of independent requests do so too, but need many more of them.
    """
    due = [Due((number + number * GOLDEN % 1) / rate, tokens, lambda: prompts.next(0)) for number in range(total)]
    return await open_loop(client, due, most, limit_s=limit_s)


async def open_loop(client: Client, due: Sequence[Due], most: int, *, limit_s: float) -> Tally:
    """Each request at its time, whether or not those before were answered. Of more than `most` at a time some wait."""
    answers: list[Answer] = []
    async with client.callers(most) as callers:
        free: asyncio.LifoQueue[Caller] = asyncio.LifoQueue()  # As few connections as will do.
        for caller in reversed(callers):
            free.put_nowait(caller)
        unanswered = dict(enumerate(due))

        async def one(number: int, asked: Due, began: float) -> None:
            await asyncio.sleep(began + asked.at_s - time.perf_counter())
            caller = await free.get()
            answers.append(await caller.ask(asked.prompt(), asked.tokens))
            del unanswered[number]
            free.put_nowait(caller)

        with _undisturbed() as spent:
            began = time.perf_counter()
            await _finish(
                [asyncio.ensure_future(one(number, asked, began)) for number, asked in enumerate(due)], limit_s
            )
            ended, cpu_s = time.perf_counter(), spent()
    failure = f"not answered within {limit_s:g} s"
    answers += [Answer(asked.tokens, failure=failure) for asked in unanswered.values()]
    total = tally(answers, client.read, ended - began)
    total.cpu_s, total.wall_s = cpu_s, ended - began
    return total


async def _finish(tasks: Sequence[asyncio.Future[None]], limit_s: float) -> int:
    """Awaits them all; returns how many had to be cancelled. Raises what one of them raised."""
    _, late = await asyncio.wait(tasks, timeout=limit_s)
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    for task in tasks:
        if not task.cancelled():
            task.result()
    return len(late)


@contextmanager
def _undisturbed() -> Iterator[Callable[[], float]]:
    """No garbage collection, which would stop all streams at once. Tells the CPU time since its beginning."""
    gc.collect()
    gc.disable()
    began = time.process_time()
    try:
        yield lambda: time.process_time() - began
    finally:
        gc.enable()
