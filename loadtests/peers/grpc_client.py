"""A gRPC client for loads: server-streaming calls over HTTP/2, as cheap to read as HTTP/1.1.

grpcio takes 25 to 50 µs of CPU per message in Python, so that it would be what is measured. Frames are cut apart when
they come; messages and their contents are read when the load is over.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

import hpack
from kvlane.v1 import inference_pb2 as pb

from loadtests.peers import http2
from loadtests.peers.answers import Answer, read_grpc
from loadtests.peers.load import Caller
from loadtests.processes import MODEL

GENERATE: Final = "/kvlane.v1.Inference/Generate"
STREAMS_EACH: Final = 64
"""Calls on one connection; servers allow about 100."""
LEAST_CONNECTIONS: Final = 4
_REFILL: Final = 1 << 28


class GrpcClient:
    """Calls of a method of `GenerateRequest` on a few connections."""

    read = staticmethod(read_grpc)

    def __init__(
        self, port: int, method: str = GENERATE, metadata: Sequence[tuple[str, str]] = (), model: str = MODEL
    ) -> None:
        self._port = port
        self._model = model
        fields = [(":authority", f"127.0.0.1:{port}"), (":path", method), ("content-type", "application/grpc")]
        self._head = http2.POST + http2.HTTP + http2.literals([*fields, ("te", "trailers"), *metadata])

    @asynccontextmanager
    async def callers(self, streams: int) -> AsyncIterator[list[Caller]]:
        number = min(streams, max(LEAST_CONNECTIONS, -(-streams // STREAMS_EACH)))
        connections = [_Connection(self._head, self._port) for _ in range(number)]
        try:
            yield [_GrpcCaller(connections[place % number], self._model) for place in range(streams)]
        finally:
            for connection in connections:
                connection.close()


class _GrpcCaller:
    def __init__(self, connection: _Connection, model: str) -> None:
        self._connection = connection
        self._model = model

    async def ask(self, prompt: str, tokens: int) -> Answer:
        request = pb.GenerateRequest(model=self._model, text=prompt, sampling=pb.SamplingParams(max_tokens=tokens))
        return await self._connection.ask(request.SerializeToString(), Answer(tokens))


class _Call:
    def __init__(self, answer: Answer, done: asyncio.Future[None]) -> None:
        self.answer = answer
        self.done = done
        self.window = 0
        self.unsent = b""

    def finish(self, failure: str = "") -> None:
        self.answer.failure = self.answer.failure or failure
        if not self.done.done():
            self.done.set_result(None)


class _Connection(asyncio.Protocol):
    """One connection, opened with its first call and again where it was lost."""

    def __init__(self, head: bytes, port: int) -> None:
        self._head = head
        self._port = port
        self._transport: asyncio.Transport | None = None
        self._opening = asyncio.Lock()
        self._reset()

    def _reset(self) -> None:
        self._frames = http2.Frames()
        # Without a table each header block stands for itself, so that the same one need not be decoded again.
        self._decoder, self._failures = hpack.Decoder(), dict[bytes, str]()
        self._calls: dict[int, _Call] = {}
        self._waiting: deque[int] = deque()
        self._number, self._block = 1, b""
        self._window = self._initial_window = http2.DEFAULT_WINDOW
        self._frame_bytes = http2.DEFAULT_FRAME_BYTES
        self._unread = 0
        self._ends = False

    async def ask(self, request: bytes, answer: Answer) -> Answer:
        loop = asyncio.get_running_loop()
        async with self._opening:
            if self._transport is None:
                try:
                    await loop.create_connection(lambda: self, "127.0.0.1", self._port)
                except OSError as error:
                    answer.failure = f"no connection: {error.strerror}"
                    return answer
        assert self._transport is not None
        number, self._number = self._number, self._number + 2
        call = self._calls[number] = _Call(answer, loop.create_future())
        call.window = self._initial_window
        call.unsent = b"\x00" + len(request).to_bytes(4, "big") + request
        answer.asked_at = time.perf_counter()
        self._transport.write(http2.frame(http2.HEADERS, http2.END_HEADERS, number, self._head))
        self._send(number, call)
        try:
            await call.done
        except asyncio.CancelledError:
            if self._calls.pop(number, None) is not None and self._transport is not None:
                self._transport.write(http2.frame(http2.RST_STREAM, 0, number, (8).to_bytes(4, "big")))
            raise
        return answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()
            self._transport = None

    # -- the transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self._reset()
        assert self._transport is not None
        self._transport.write(
            http2.PREFACE
            + http2.settings(header_table_size=0, initial_window_size=http2.MOST_WINDOW)
            + http2.window_update(0, http2.MOST_WINDOW - http2.DEFAULT_WINDOW)
        )

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.finish("the connection was lost")

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        for kind, flags, stream, payload in self._frames.feed(data):
            if kind != http2.DATA:
                self._other(kind, flags, stream, payload)
                continue
            self._unread += len(payload)
            call = self._calls.get(stream)
            if call is not None and payload:
                call.answer.times.append(now)
                call.answer.pieces.append(payload)
            if flags & http2.END_STREAM:
                self._over(stream, "a stream without its status")
        if self._unread >= _REFILL and self._transport is not None:
            self._transport.write(http2.window_update(0, self._unread))
            self._unread = 0

    def _other(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        assert self._transport is not None
        if kind in (http2.HEADERS, http2.CONTINUATION):
            self._headers(kind, flags, stream, payload)
        elif kind == http2.RST_STREAM:
            self._over(stream, f"the stream was reset: {int.from_bytes(payload, 'big')}")
        elif kind == http2.SETTINGS and not flags & http2.ACK:
            self._set(payload)
            self._transport.write(http2.frame(http2.SETTINGS, http2.ACK, 0))
        elif kind == http2.PING and not flags & http2.ACK:
            self._transport.write(http2.frame(http2.PING, http2.ACK, 0, payload))
        elif kind == http2.WINDOW_UPDATE:
            self._grow(stream, int.from_bytes(payload, "big"))
        elif kind == http2.GOAWAY:
            last = int.from_bytes(payload[:4], "big")
            for number in [number for number in self._calls if number > last]:
                self._over(number, "the server goes away")

    def _headers(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == http2.HEADERS:
            self._ends = bool(flags & http2.END_STREAM)
        self._block += payload
        if not flags & http2.END_HEADERS:
            return
        block, self._block = self._block, b""
        if self._ends:
            failure = self._failures.get(block)
            if failure is None:
                failure = self._failures[block] = self._failure(block)
            self._over(stream, failure)

    def _failure(self, block: bytes) -> str:
        fields = dict(self._decoder.decode(block, raw=True))
        status, message = fields.get(b"grpc-status", b"2"), fields.get(b"grpc-message", b"")
        return "" if status == b"0" else f"status {status.decode()}: {message.decode()}"

    def _over(self, stream: int, failure: str) -> None:
        call = self._calls.pop(stream, None)
        if call is not None:
            call.finish(failure)

    # -- sending within the server's windows

    def _set(self, payload: bytes) -> None:
        for at in range(0, len(payload), 6):
            name, value = int.from_bytes(payload[at : at + 2], "big"), int.from_bytes(payload[at + 2 : at + 6], "big")
            if name == http2.INITIAL_WINDOW_SIZE:
                for call in self._calls.values():
                    call.window += value - self._initial_window
                self._initial_window = value
                self._send_waiting()
            elif name == http2.MAX_FRAME_SIZE:
                self._frame_bytes = value

    def _grow(self, stream: int, size: int) -> None:
        if not stream:
            self._window += size
        elif stream in self._calls:
            self._calls[stream].window += size
        self._send_waiting()

    def _send_waiting(self) -> None:
        for _ in range(len(self._waiting)):
            number = self._waiting.popleft()
            call = self._calls.get(number)
            if call is not None:
                self._send(number, call)

    def _send(self, number: int, call: _Call) -> None:
        assert self._transport is not None
        while call.unsent:
            size = min(len(call.unsent), self._frame_bytes, self._window, call.window)
            if size <= 0:
                self._waiting.append(number)
                return
            part, call.unsent = call.unsent[:size], call.unsent[size:]
            self._window -= size
            call.window -= size
            flags = 0 if call.unsent else http2.END_STREAM
            self._transport.write(http2.frame(http2.DATA, flags, number, part))
