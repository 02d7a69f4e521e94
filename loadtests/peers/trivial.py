"""What the load generator can take: a server that does nothing but write, and the load against it.

`python -m loadtests.peers.trivial PORT` serves until it is told to end. It writes one event to each stream in turn, as
often as it can, which is the least that any server does; so the figure is a lower bound of what the load could take.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time
from pathlib import Path
from typing import Final

import msgspec
import uvloop

from loadtests.peers import load
from loadtests.peers.base import answers
from loadtests.peers.children import child, free_port
from loadtests.peers.clients import HttpClient
from loadtests.peers.load import Prompts

_HEAD: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
_EVENT: Final = (
    b'data: {"id":"cmpl-0123456789abcdef0123456789abcdef","object":"text_completion","created":1795330117,'
    b'"model":"sim","choices":[{"index":0,"text":"k42 ","logprobs":null,"finish_reason":null,"stop_reason":null}]}\n\n'
)
_CHUNK: Final = b"%x\r\n%b\r\n" % (len(_EVENT), _EVENT)
_END: Final = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
_LENGTH: Final = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_TOKENS: Final = re.compile(rb'"max_tokens": *(\d+)')


class Ceiling(msgspec.Struct):
    """What the load took."""

    chunks_per_s: float
    requests_per_s: float
    cpu_us_per_chunk: float
    """The load generator's own."""


class _Pump:
    """Writes one event to each open stream, over and over."""

    def __init__(self) -> None:
        self._left: dict[asyncio.Transport, int] = {}

    def begin(self, transport: asyncio.Transport, tokens: int) -> None:
        transport.write(_HEAD)
        self._left[transport] = tokens
        if len(self._left) == 1:
            asyncio.get_running_loop().call_soon(self._turn)

    def end(self, transport: asyncio.Transport) -> None:
        self._left.pop(transport, None)

    def _turn(self) -> None:
        for transport, left in list(self._left.items()):
            if left > 1:
                self._left[transport] = left - 1
                transport.write(_CHUNK)
            else:
                del self._left[transport]
                transport.write(_CHUNK + _END)
        if self._left:
            asyncio.get_running_loop().call_soon(self._turn)


class _Connection(asyncio.Protocol):
    def __init__(self, pump: _Pump) -> None:
        self._pump = pump
        self._held = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self._held += data
        head, found, body = self._held.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if not found or length is None or len(body) < int(length[1]):
            return
        self._held = b""
        tokens = _TOKENS.search(body)
        self._pump.begin(self._transport, int(tokens[1]) if tokens else 1)

    def connection_lost(self, exc: Exception | None) -> None:
        self._pump.end(self._transport)


async def serve(port: int) -> None:
    """Until it is cancelled."""
    pump = _Pump()
    server = await asyncio.get_running_loop().create_server(
        lambda: _Connection(pump), "127.0.0.1", port, backlog=load.MAX_STREAMS
    )
    await server.serve_forever()


def measure(streams: int, tokens: int, prompts: Prompts, seconds: float, log: Path) -> Ceiling:
    """Raises `PeerError` where the trivial server cannot be started."""
    port = free_port()
    arguments = [sys.executable, "-m", "loadtests.peers.trivial", str(port)]
    with child("trivial server", arguments, log, lambda: answers(port)):
        client, limit_s = HttpClient([port]), seconds + 30.0
        began = time.process_time()
        long = uvloop.run(load.closed_loop(client, streams, tokens, prompts, rounds=1, limit_s=limit_s))
        cpu_s = time.process_time() - began
        sated = uvloop.run(load.saturation(client, streams, tokens, prompts, seconds=seconds, limit_s=limit_s))
        short = uvloop.run(load.saturation(client, streams, 1, prompts, seconds=seconds, limit_s=limit_s))
    return Ceiling(
        chunks_per_s=sated.chunks / sated.seconds,
        requests_per_s=short.requests / short.seconds,
        cpu_us_per_chunk=1e6 * cpu_s / max(1, long.chunks),
    )


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
