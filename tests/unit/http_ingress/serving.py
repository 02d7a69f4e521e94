"""A running HTTP ingress for tests: a real server on a real socket, a scripted dispatch behind it."""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from router.ingress.base import CacheStatus, ModelStatus, Readiness
from router.ingress.http import HttpIngress
from router.lane.frames import End
from router.options import HttpOptions
from router.types import CacheMode, ModelCard, Reason, Receipt, Request, Sink
from tests.unit.certificates import Certificate

DEADLINE_S = 10.0
JSON = (("content-type", "application/json"),)
SSE = (("content-type", "text/event-stream; charset=utf-8"),)
CHAT = b'{"model":"tiny","messages":[{"role":"user","content":"hi"}]}'

TLS: Certificate | None = None
"""The server's; tests that hold over TLS too set it in turn."""

Script = Callable[[Request, Sink], Awaitable[None]]


def receipt(request: Request, replica: str = "r-1") -> Receipt:
    return Receipt(request.request_id, replica, "random", Reason.RANDOM, 3)


async def echo(request: Request, sink: Sink) -> None:
    """Answers with the request's path and body, sized."""
    body = f"{request.method} {request.path} ".encode() + request.body
    sink.routed(receipt(request))
    sink.head(200, (("content-type", "text/plain"), ("content-length", str(len(body)))))
    sink.data(body, 0)


async def stream(request: Request, sink: Sink) -> None:
    """Three events and the end."""
    sink.routed(receipt(request))
    sink.head(200, SSE)
    for word in (b"one", b"two", b"three"):
        sink.data(b"data: %b\n\n" % word, 1)
        await asyncio.sleep(0)
    sink.data(b"data: [DONE]\n\n", 0)


class FakeDispatch:
    """Runs a script per request, and tells what happened to it."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[Request] = []
        self.sinks: list[Sink] = []
        self.running = asyncio.Event()
        self.ended = asyncio.Event()
        self.outcome: list[type[BaseException] | None] = []

    async def run(self, request: Request, sink: Sink) -> End:
        self.requests.append(request)
        self.sinks.append(sink)
        self.running.set()
        try:
            await self.script(request, sink)
        except BaseException as error:
            self.outcome.append(type(error))
            raise
        else:
            self.outcome.append(None)
        finally:
            self.ended.set()
        return End(finish="stop")


class FakeFleet:
    """Two models and a handful of paths."""

    routes: dict[str, tuple[str, ...]]

    def __init__(self) -> None:
        self.cards = [ModelCard("lora-a", parent="tiny", max_model_len=64), ModelCard("tiny", max_model_len=64)]
        self.ready = True
        self.routes = {
            "/v1/chat/completions": ("POST",),
            "/v1/completions": ("POST",),
            "/v1/audio/transcriptions": ("POST",),
            "/v1/messages": ("POST",),
            "/v1/responses/x": ("GET",),
            "/tokenize": ("POST",),
            "/health": ("GET",),
            "/reset_prefix_cache": ("POST",),
            "/v1/load_lora_adapter": ("POST",),
        }

    def models(self) -> tuple[ModelStatus, ...]:
        return tuple(ModelStatus(card, ready_replicas=1) for card in self.cards)

    def parent(self, model: str) -> str:
        return next((card.parent for card in self.cards if card.name == model), "")

    def methods(self, path: str) -> tuple[str, ...]:
        return self.routes.get(path, ())

    def readiness(self) -> Readiness:
        caches = {"r-1": CacheStatus(CacheMode.EXACT), "r-2": CacheStatus(CacheMode.APPROXIMATE, "no events")}
        return Readiness(self.ready, {"tiny": 1 if self.ready else 0}, caches)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def tls_options() -> dict[str, Any]:
    """Of a client's connection."""
    return {"ssl": TLS.client(), "server_hostname": "localhost"} if TLS is not None else {}


class Served:
    """The server under test and its fakes."""

    def __init__(self, ingress: HttpIngress, port: int, dispatch: FakeDispatch, fleet: FakeFleet, clock: Clock) -> None:
        self.ingress = ingress
        self.port = port
        self.dispatch = dispatch
        self.fleet = fleet
        self.clock = clock
        self.defects: list[dict[str, Any]] = []
        self.refused: list[tuple[str, str]] = []
        self.handshakes: list[tuple[str, str]] = []
        """TLS handshakes that were refused."""

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}" if self.ingress.tls else f"http://127.0.0.1:{self.port}"

    async def connect(self) -> Client:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, **tls_options())
        return Client(reader, writer)

    async def say(self, data: bytes) -> Answer:
        """One connection, one request, one answer."""
        client = await self.connect()
        try:
            client.write(data)
            return await client.answer()
        finally:
            await client.close()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Lets the loop turn until the condition holds."""
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                await asyncio.sleep(0)

    @property
    def deadlines(self) -> list[float]:
        """When each connection would time out, in seconds from now."""
        return [connection.deadline - self.clock.now for connection in self.ingress._connections]

    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds
        self.ingress.sweep()


class Answer:
    """One response, its framing undone."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body


class Client:
    """Raw bytes out, parsed answers in, all with a deadline."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def write(self, data: bytes) -> None:
        self.writer.write(data)

    async def head(self) -> tuple[int, dict[str, str]]:
        async with asyncio.timeout(DEADLINE_S):
            lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
        pairs = (line.partition(": ")[::2] for line in lines[1:])
        return int(lines[0].split(" ")[1]), dict(pairs)

    async def chunk(self) -> bytes:
        async with asyncio.timeout(DEADLINE_S):
            size = int(await self.reader.readuntil(b"\r\n"), 16)
            return (await self.reader.readexactly(size + 2))[:-2]

    async def answer(self, *, head_only: bool = False) -> Answer:
        status, headers = await self.head()
        body = b"" if head_only or status in (204, 304) else await self._body(headers)
        return Answer(status, headers, body)

    async def _body(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding") == "chunked":
            chunks = []
            while piece := await self.chunk():
                chunks.append(piece)
            return b"".join(chunks)
        async with asyncio.timeout(DEADLINE_S):
            if "content-length" in headers:
                return await self.reader.readexactly(int(headers["content-length"]))
            return await self.reader.read()

    def end(self) -> None:
        """Says no more, where that can be said: TLS ends both sides at once."""
        if self.writer.can_write_eof():
            self.writer.write_eof()

    async def rest(self) -> bytes:
        """All that comes until the server closes."""
        async with asyncio.timeout(DEADLINE_S):
            return await self.reader.read()

    async def close(self) -> None:
        self.writer.close()
        try:
            async with asyncio.timeout(DEADLINE_S):
                await self.writer.wait_closed()
        except (ConnectionError, ssl.SSLError):
            pass  # The server may have reset it, or still send; that is then the test's subject.


def post(path: str = "/v1/chat/completions", body: bytes = CHAT, *lines: str) -> bytes:
    extra = "".join(f"{line}\r\n" for line in lines)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{extra}"
    )
    return head.encode("latin-1") + b"\r\n" + body


def get(path: str, *lines: str, method: str = "GET") -> bytes:
    extra = "".join(f"{line}\r\n" for line in lines)
    return f"{method} {path} HTTP/1.1\r\nHost: a\r\n{extra}\r\n".encode("latin-1")


@asynccontextmanager
async def served(script: Script = echo, **options: Any) -> AsyncIterator[Served]:
    """Serves until the block ends; fails the test where anything raised inside the event loop."""
    dispatch, fleet, clock = FakeDispatch(script), FakeFleet(), Clock()
    refused: list[tuple[str, str]] = []
    tls = TLS.options if TLS is not None else {}
    gate = options.pop("gate", None)
    handshakes: list[tuple[str, str]] = []
    ingress = HttpIngress(
        HttpOptions(port=0, **{**tls, **options}),
        dispatch,
        fleet,
        metrics=lambda: (b"kvlane_up 1\n", "text/plain; version=0.0.4"),
        clock=clock,
        wall=lambda: 1_700_000_000.0,
        chance=random.Random(7),
        refused=lambda rpc, error: refused.append((rpc, error)),
        handshake_refused=lambda section, reason: handshakes.append((section, reason)),
        gate=gate,
    )
    serving = Served(ingress, await ingress.start(), dispatch, fleet, clock)
    serving.refused = refused
    serving.handshakes = handshakes
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: serving.defects.append(context))
    try:
        yield serving
    finally:
        await ingress.stop(0)
        loop.set_exception_handler(None)
    assert not serving.defects
    assert ingress.connections == 0
