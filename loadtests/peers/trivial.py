"""What the load generator can take: servers that do nothing but write, and the load against them.

`python -m loadtests.peers.trivial PROTOCOL PORT [JOINED]` serves until it is told to end. It writes one token to each
stream in turn, as often as it can, which is the least that any server does; so the figures are a lower bound of what
the load generator could take. A router that is late joins what several steps have of a stream; so does this one,
`JOINED` tokens in one write.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Final

import msgspec
import uvloop
from kvlane.v1 import inference_pb2 as pb

from loadtests.peers import http2, load
from loadtests.peers.answers import Tally
from loadtests.peers.base import answers, answers_grpc
from loadtests.peers.children import child, free_port
from loadtests.peers.clients import HttpClient
from loadtests.peers.grpc_client import GrpcClient
from loadtests.peers.load import Client, Prompts

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
_MESSAGE: Final = pb.GenerateResponse(text="k42 ", token_ids=[42]).SerializeToString()
_PREFIXED: Final = b"\x00" + len(_MESSAGE).to_bytes(4, "big") + _MESSAGE
JOINED: Final = 8
"""Tokens in a write of a server that joins them."""
_GRPC_HEAD: Final = http2.STATUS_200 + http2.literals([("content-type", "application/grpc")])
_TRAILERS: Final = http2.literals([("grpc-status", "0")])


class Ceiling(msgspec.Struct):
    """What the load generator took in."""

    protocol: str
    streams: int
    chunks_per_s: float
    requests_per_s: float
    cpu_us_per_chunk: float
    """The load generator's own, as is the next."""
    cpu_us_per_request: float
    cores: float
    """How much of one it was busy with while it took in so many chunks."""
    joined_chunks_per_s: float
    """Where `JOINED` come in one write."""


class Stream(msgspec.Struct):
    """What is written of one answer."""

    write: Callable[[bytes], object]
    left: int
    token: bytes
    end: bytes


class Pump:
    """Writes one token to each open stream, or some, over and over."""

    def __init__(self, joined: int = 1) -> None:
        self._joined = joined
        self._streams: dict[Hashable, Stream] = {}

    def begin(self, key: Hashable, stream: Stream) -> None:
        self._streams[key] = stream
        if len(self._streams) == 1:
            asyncio.get_running_loop().call_soon(self._turn)

    def end(self, key: Hashable) -> None:
        self._streams.pop(key, None)

    def _turn(self) -> None:
        for key, stream in list(self._streams.items()):
            if stream.left > self._joined:
                stream.left -= self._joined
                stream.write(stream.token * self._joined)
            else:
                del self._streams[key]
                stream.write(stream.token * stream.left + stream.end)
        if self._streams:
            asyncio.get_running_loop().call_soon(self._turn)


class _Http(asyncio.Protocol):
    def __init__(self, pump: Pump) -> None:
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
        self._transport.write(_HEAD)
        self._pump.begin(self, Stream(self._transport.write, int(tokens[1]) if tokens else 1, _CHUNK, _END))

    def connection_lost(self, exc: Exception | None) -> None:
        self._pump.end(self)


class _Grpc(asyncio.Protocol):
    """Trusts that windows are as large as the load's are."""

    def __init__(self, pump: Pump) -> None:
        self._pump = pump
        self._frames = http2.Frames()
        self._bodies: dict[int, bytes] = {}
        self._preface = len(http2.PREFACE)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        transport.write(  # type: ignore[attr-defined]
            http2.settings(initial_window_size=http2.MOST_WINDOW)
            + http2.window_update(0, http2.MOST_WINDOW - http2.DEFAULT_WINDOW)
        )

    def data_received(self, data: bytes) -> None:
        skipped = min(self._preface, len(data))
        self._preface -= skipped
        for kind, flags, stream, payload in self._frames.feed(data[skipped:]):
            if kind == http2.SETTINGS and not flags & http2.ACK:
                self._transport.write(http2.frame(http2.SETTINGS, http2.ACK, 0))
            elif kind == http2.PING and not flags & http2.ACK:
                self._transport.write(http2.frame(http2.PING, http2.ACK, 0, payload))
            elif kind == http2.DATA:
                body = self._bodies.pop(stream, b"") + payload
                if flags & http2.END_STREAM:
                    self._asked(stream, body)
                else:
                    self._bodies[stream] = body

    def _asked(self, stream: int, body: bytes) -> None:
        tokens = pb.GenerateRequest.FromString(body[5:]).sampling.max_tokens
        self._transport.write(http2.frame(http2.HEADERS, http2.END_HEADERS, stream, _GRPC_HEAD))
        end = http2.frame(http2.HEADERS, http2.END_HEADERS | http2.END_STREAM, stream, _TRAILERS)
        token = http2.frame(http2.DATA, 0, stream, _PREFIXED)
        self._pump.begin((self, stream), Stream(self._transport.write, tokens, token, end))

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport.abort()


async def serve(protocol: str, port: int, joined: int = 1) -> None:
    """Until it is cancelled."""
    pump, kind = Pump(joined), {"http": _Http, "grpc": _Grpc}[protocol]
    server = await asyncio.get_running_loop().create_server(
        lambda: kind(pump), "127.0.0.1", port, backlog=load.MAX_STREAMS
    )
    await server.serve_forever()


def measure(protocol: str, streams: int, tokens: int, prompts: Prompts, seconds: float, log: Path) -> Ceiling:
    """Raises `PeerError` where the trivial server cannot be started."""
    long = _saturated(protocol, streams, tokens, prompts, seconds, log)
    short = _saturated(protocol, streams, 1, prompts, seconds, log)
    joined = _saturated(protocol, streams, tokens, prompts, seconds, log, JOINED)
    return Ceiling(
        protocol=protocol,
        streams=streams,
        chunks_per_s=round(long.chunks / long.seconds, 1),
        requests_per_s=round(short.requests / short.seconds, 1),
        cpu_us_per_chunk=round(1e6 * long.cpu_s / max(1, long.chunks), 2),
        cpu_us_per_request=round(1e6 * short.cpu_s / max(1, short.requests), 2),
        cores=round(long.cpu_s / long.wall_s, 2),
        joined_chunks_per_s=round(joined.chunks / joined.seconds, 1),
    )


def _saturated(
    protocol: str, streams: int, tokens: int, prompts: Prompts, seconds: float, log: Path, joined: int = 1
) -> Tally:
    port = free_port()
    arguments = [sys.executable, "-m", "loadtests.peers.trivial", protocol, str(port), str(joined)]
    client: Client = GrpcClient(port) if protocol == "grpc" else HttpClient([port])
    serves = answers_grpc if protocol == "grpc" else answers
    with child("trivial server", arguments, log, lambda: serves(port)):
        asked = load.saturation(client, streams, tokens, prompts, seconds=seconds, limit_s=seconds + 30.0)
        return uvloop.run(asked)


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 1))
