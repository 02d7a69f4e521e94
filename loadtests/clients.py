"""Clients that count: closed loops of streams over HTTP and gRPC, as cheap as they can be made."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import grpc
import msgspec
from kvlane.v1 import inference_pb2 as pb

from loadtests.processes import MODEL

RUN_TIMEOUT_S = 120.0
_TERMINATOR = b"0\r\n\r\n"


class Tally(msgspec.Struct):
    """What a load got."""

    requests: int = 0
    chunks: int = 0
    """SSE events with a token, or gRPC messages with one."""
    errors: int = 0
    ttft_s: list[float] = []
    seconds: float = 0.0


def prompt(kilobytes: float, stream: int) -> str:
    """A prompt of that size that differs from other streams' from its first words on."""
    words = f"stream {stream} says "
    return (words * (int(kilobytes * 1024) // len(words) + 1))[: int(kilobytes * 1024)]


class _HttpStream(asyncio.Protocol):
    """One keep-alive connection that asks one request after the other."""

    def __init__(self, request: bytes, rounds: int, tally: Tally) -> None:
        self._request = request
        self._left = rounds
        self._tally = tally
        self._tail = b""
        self._first = False
        self._sent_at = 0.0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._ask()

    def _ask(self) -> None:
        self._left -= 1
        self._first = True
        self._tail = b""
        self._sent_at = time.perf_counter()
        self._transport.write(self._request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        if self._first:
            self._first = False
            self._tally.ttft_s.append(time.perf_counter() - self._sent_at)
            if not data.startswith(b"HTTP/1.1 200"):
                self._tally.errors += 1
        self._tally.chunks += data.count(b"data: {")
        self._tail = (self._tail + data)[-len(_TERMINATOR) :]
        if self._tail == _TERMINATOR:
            self._tally.requests += 1
            if self._left:
                self._ask()
            else:
                self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._left or exc is not None:
            self._tally.errors += 1
        if not self.done.done():
            self.done.set_result(None)


async def http_load(
    port: int, streams: int, tokens: int, prompt_kb: float, rounds: int, spread_s: float = 0.0
) -> Tally:
    """`streams` connections, each asking `rounds` streamed completions of `tokens` tokens, one after the other.

    They begin evenly spread over `spread_s` seconds.
    """
    tally, loop = Tally(), asyncio.get_running_loop()
    began = time.perf_counter()
    protocols = []
    for number in range(streams):
        body = json.dumps(
            {"model": MODEL, "prompt": prompt(prompt_kb, number), "max_tokens": tokens, "stream": True}
        ).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        request = head.encode() + body
        _, protocol = await loop.create_connection(
            lambda request=request: _HttpStream(request, rounds, tally),  # type: ignore[misc]
            "127.0.0.1",
            port,
        )
        protocols.append(protocol)
        await asyncio.sleep(spread_s / streams)
    async with asyncio.timeout(RUN_TIMEOUT_S):
        await asyncio.gather(*(protocol.done for protocol in protocols))
    tally.seconds = time.perf_counter() - began
    return tally


async def grpc_load(
    port: int, streams: int, tokens: int, prompt_kb: float, rounds: int, spread_s: float = 0.0, channels: int = 4
) -> Tally:
    """The same over gRPC, the streams shared out over `channels` connections."""
    tally = Tally()
    opened = [
        grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.use_local_subchannel_pool", 1)])
        for _ in range(channels)
    ]
    calls: list[Any] = [
        channel.unary_stream("/kvlane.v1.Inference/Generate")  # raw bytes: parsing would cost more than the rest
        for channel in opened
    ]

    async def one(number: int) -> None:
        sampling = pb.SamplingParams(max_tokens=tokens)
        request = pb.GenerateRequest(model=MODEL, text=prompt(prompt_kb, number), sampling=sampling).SerializeToString()
        await asyncio.sleep(spread_s * number / streams)
        for _ in range(rounds):
            sent_at, messages = time.perf_counter(), 0
            try:
                async for _message in calls[number % channels](request):
                    if not messages:
                        tally.ttft_s.append(time.perf_counter() - sent_at)
                    messages += 1
            except grpc.aio.AioRpcError:
                tally.errors += 1
            tally.requests += 1
            tally.chunks += messages - 1  # the first carries the route

    began = time.perf_counter()
    async with asyncio.timeout(RUN_TIMEOUT_S):
        await asyncio.gather(*(one(number) for number in range(streams)))
    tally.seconds = time.perf_counter() - began
    for channel in opened:
        await channel.close()
    return tally
