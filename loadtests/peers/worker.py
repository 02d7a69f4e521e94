"""The HTTP side of a bench's replica: as little as an HTTP/1.1 server can do, so that it is not what is measured.

It trusts who asks: routers of the same bench, on loopback. Streams go from the engine's own call straight to the
socket, with no task in between. What other routers want to know before they use a worker is answered too.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from typing import Final

import msgspec

from engine.base import Abort, Engine, StreamOut
from router.errors import KvlaneError
from router.lane.frames import Submit
from router.types import Headers, Rpc

_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CHUNKED: Final = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
_NUMBERS: Final = itertools.count()


class Worker(asyncio.Protocol):
    """One connection: one request after the other."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._parts: list[bytes] = []
        self._missing = 0
        """Bytes without which there is no use in looking again."""
        self._out: _Out | None = None
        self._abort: Abort = _nothing

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self._parts.append(data)
        self._missing -= len(data)
        if self._missing > 0 or self._out is not None:
            return
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts = [data]
        head, found, _ = data.partition(b"\r\n\r\n")
        if not found:
            return
        begin = len(head) + 4
        length = _LENGTH.search(head)
        if length is not None:
            end = begin + int(length[1])
            if len(data) < end:
                self._missing = end - len(data)
                return
            body = data[begin:end]
        elif _CHUNKED.search(head) is not None:
            end = data.find(b"0\r\n\r\n", begin) + 5
            if end < 5:
                return
            body = _joined(data[begin:end])
        else:
            body, end = b"", begin
        self._parts = [data[end:]] if len(data) > end else []
        self._asked(head, body)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._out is not None:
            self._out = None
            self._abort()

    def _asked(self, head: bytes, body: bytes) -> None:
        method, path, _ = head.split(b" ", 2)
        if method == b"GET":
            self._transport.write(_page(path, self._engine))
            self._next()
            return
        number = next(_NUMBERS)
        self._out = _Out(self, self._transport)
        call = Submit(number, f"{number:032x}", Rpc.HTTP, method.decode(), path.decode(), (), body)
        self._abort = self._engine.submit(call, self._out)

    def over(self) -> None:
        """The answer is whole."""
        self._out = None
        self._next()

    def _next(self) -> None:
        if self._parts:
            asyncio.get_running_loop().call_soon(self._again)

    def _again(self) -> None:
        self._missing = 0
        self.data_received(b"")


class _Out(StreamOut):
    def __init__(self, worker: Worker, transport: asyncio.Transport) -> None:
        self._worker = worker
        self._transport = transport
        self._head = b""
        self._over = False

    def head(self, status: int, headers: Headers) -> None:
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
        self._head = f"HTTP/1.1 {status} OK\r\n{lines}transfer-encoding: chunked\r\n\r\n".encode()

    def data(self, payload: bytes, tokens: int = 0, *, urgent: bool = False) -> None:
        if self._over:
            return
        if self._head:
            self._transport.write(b"%b%x\r\n%b\r\n" % (self._head, len(payload), payload))
            self._head = b""
        else:
            self._transport.write(b"%x\r\n%b\r\n" % (len(payload), payload))

    def end(self, finish: str = "") -> None:
        if not self._over:
            self._over = True
            self._transport.write(self._head + b"0\r\n\r\n")
            self._worker.over()

    def fail(self, error: KvlaneError) -> None:
        if not self._over:
            self._over = True
            if self._head or error.http_status < 500:
                body = msgspec.json.encode({"error": {"message": error.message, "code": error.http_status}})
                self._transport.write(_answer(error.http_status, "application/json", body))
                self._worker.over()
            else:
                self._transport.abort()


def _page(path: bytes, engine: Engine) -> bytes:
    if path == b"/health":
        return _answer(200, "text/plain", b"")
    if path == b"/version":
        return _answer(200, "application/json", b'{"version":"0.0.0"}')
    if path == b"/v1/models":
        cards = [
            {"id": card.name, "object": "model", "created": 0, "owned_by": "bench", "max_model_len": card.max_model_len}
            for card in engine.info().models
        ]
        return _answer(200, "application/json", msgspec.json.encode({"object": "list", "data": cards}))
    return _answer(404, "text/plain", b"Not Found")


def _answer(status: int, kind: str, body: bytes) -> bytes:
    return f"HTTP/1.1 {status} -\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


def _joined(chunked: bytes) -> bytes:
    """The body in a chunked one (RFC 9112, 7.1)."""
    parts, at = list[bytes](), 0
    while True:
        line = chunked.index(b"\r\n", at)
        size = int(chunked[at:line].partition(b";")[0], 16)
        if not size:
            return b"".join(parts)
        parts.append(chunked[line + 2 : line + 2 + size])
        at = line + size + 4


def _nothing() -> None:
    """The abort of a connection that has not asked."""
