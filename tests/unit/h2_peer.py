"""A client of HTTP/2 that sends what it is told to, frame by frame, however wrong, and reads what comes."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from hpack import Decoder, Encoder
from hyperframe.frame import (
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)
from kvlane.v1 import inference_pb2 as pb

from router.ingress.h2_frames import PREFACE
from tests.unit.grpc_serving import PROMPT, SERVICE, Served

HEADERS: tuple[tuple[str, str], ...] = (
    (":method", "POST"),
    (":scheme", "http"),
    (":path", f"{SERVICE}Generate"),
    (":authority", "test"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
)
DEADLINE_S = 10


def framed(message: bytes, *, compressed: bool = False) -> bytes:
    """A message with its prefix."""
    return bytes([compressed]) + len(message).to_bytes(4, "big") + message


def messages(data: bytes) -> list[bytes]:
    """What `framed` put together."""
    found = []
    while data:
        size = int.from_bytes(data[1:5], "big")
        assert data[0] == 0, "not compressed"
        assert len(data) >= 5 + size, "whole"
        found.append(data[5 : 5 + size])
        data = data[5 + size :]
    return found


def texts(data: bytes) -> list[str]:
    """The text of each message; empty for the route."""
    return [pb.GenerateResponse.FromString(each).text for each in messages(data)]


BODY = framed(PROMPT.SerializeToString())


class Answer(msgspec.Struct):
    """What came on one stream."""

    headers: dict[str, str] = {}
    data: bytes = b""
    trailers: dict[str, str] = {}
    reset: int | None = None
    frames: int = 0
    """Of DATA."""

    @property
    def status(self) -> int:
        """gRPC's."""
        return int((self.trailers or self.headers)["grpc-status"])


class Peer:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.encoder = Encoder()
        self.decoder = Decoder()
        self.answers: dict[int, Answer] = {}
        self.ended: set[int] = set()
        self.goaway: GoAwayFrame | None = None
        self.settings: dict[int, int] = {}
        self.pongs: list[bytes] = []
        self.pings: list[bytes] = []
        self.window_opened = 0
        """By the server, for the connection."""
        self.stream_windows: dict[int, int] = {}
        """By how much the server opened those of streams."""

    def send(self, *what: Frame | bytes) -> None:
        self._writer.write(b"".join(each if isinstance(each, bytes) else each.serialize() for each in what))

    def settle(self, settings: dict[int, int] | None = None) -> None:
        self.send(PREFACE, SettingsFrame(0, settings=settings or {}))

    def call(
        self, stream: int, body: bytes | None = BODY, *, end: bool = True, headers: Iterable[tuple[str, str]] = HEADERS
    ) -> None:
        """Opens a stream; without a body its headers end it, if at all."""
        block = self.encoder.encode(list(headers))
        head = HeadersFrame(stream, block, flags=["END_HEADERS", *(["END_STREAM"] if body is None and end else [])])
        self.send(head, *([] if body is None else self._cut(stream, body, end)))

    @staticmethod
    def _cut(stream: int, body: bytes, end: bool) -> list[Frame]:
        pieces = [body[at : at + 16384] for at in range(0, len(body), 16384)] or [b""]
        return [
            DataFrame(stream, piece, flags=["END_STREAM"] if end and at == len(pieces) - 1 else [])
            for at, piece in enumerate(pieces)
        ]

    def data(self, stream: int, body: bytes, *, end: bool = False) -> None:
        self.send(*self._cut(stream, body, end))

    def reset(self, stream: int) -> None:
        self.send(RstStreamFrame(stream, error_code=8))

    def open_window(self, stream: int, by: int) -> None:
        self.send(WindowUpdateFrame(stream, window_increment=by))

    async def read(self) -> Frame:
        """The next frame, noted. Raises `EOFError` at the end."""
        try:
            async with asyncio.timeout(DEADLINE_S):
                head = await self._reader.readexactly(9)
                frame, length = Frame.parse_frame_header(memoryview(head))
                frame.parse_body(memoryview(await self._reader.readexactly(length)))
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            raise EOFError from error
        self._note(frame)
        return frame

    def _note(self, frame: Frame) -> None:
        answer = self.answers.setdefault(frame.stream_id, Answer())
        if isinstance(frame, HeadersFrame):
            fields: dict[str, str] = dict(self.decoder.decode(frame.data))  # type: ignore[arg-type]
            if answer.headers:
                answer.trailers = fields
            else:
                answer.headers = fields
        elif isinstance(frame, DataFrame):
            answer.data += frame.data
            answer.frames += 1
        elif isinstance(frame, RstStreamFrame):
            answer.reset = frame.error_code
            self.ended.add(frame.stream_id)
        elif isinstance(frame, GoAwayFrame):
            self.goaway = frame
        elif isinstance(frame, SettingsFrame):
            self.settings |= frame.settings
        elif isinstance(frame, PingFrame):
            (self.pongs if "ACK" in frame.flags else self.pings).append(frame.opaque_data)
        elif isinstance(frame, WindowUpdateFrame) and frame.stream_id:
            opened = self.stream_windows.get(frame.stream_id, 0)
            self.stream_windows[frame.stream_id] = opened + frame.window_increment
        elif isinstance(frame, WindowUpdateFrame):
            self.window_opened += frame.window_increment
        if "END_STREAM" in frame.flags:
            self.ended.add(frame.stream_id)

    async def answer(self, stream: int) -> Answer:
        """What a stream gets until it ends."""
        while stream not in self.ended:
            await self.read()
        return self.answers[stream]

    async def some(self, stream: int, size: int) -> bytes:
        """The stream's data once it has that many bytes."""
        while len(self.answers.get(stream, Answer()).data) < size:
            await self.read()
        return self.answers[stream].data

    async def echo(self) -> None:
        """All that the server has to say to what was sent is read."""
        before = len(self.pongs)
        self.send(PingFrame(0, opaque_data=b"12345678"))
        while len(self.pongs) == before:
            await self.read()

    async def end(self) -> int | None:
        """Reads until the server closes, and closes then as clients do; the code of its GOAWAY."""
        try:
            while True:
                await self.read()
        except EOFError:
            self._writer.close()
            return self.goaway.error_code if self.goaway is not None else None

    def stop_reading(self) -> None:
        self._writer.transport.pause_reading()  # type: ignore[attr-defined]

    def go_on_reading(self) -> None:
        self._writer.transport.resume_reading()  # type: ignore[attr-defined]

    async def drain(self) -> None:
        """Until what was sent has left, nearly."""
        await self._writer.drain()

    async def close(self) -> None:
        self._writer.transport.abort()
        try:
            await self._writer.wait_closed()
        except OSError:
            pass  # It was reset by the server before.


@asynccontextmanager
async def peer(
    served: Served, *, settle: bool = True, settings: dict[int, int] | None = None, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Peer]:
    """A connection to the ingress, by default with the settings exchanged."""
    host, _, port = served.target.rpartition(":")
    options: dict[str, Any] = {"ssl": tls, "server_hostname": "localhost"} if tls else {}
    reader, writer = await asyncio.open_connection(host, int(port), **options)
    opened = Peer(reader, writer)
    try:
        if settle:
            opened.settle(settings)
            while not opened.settings:
                await opened.read()
            opened.send(SettingsFrame(0, flags=["ACK"]))
        yield opened
    finally:
        await opened.close()
