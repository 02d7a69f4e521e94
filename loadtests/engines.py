"""A process of simulated replicas for load tests: a lane port and a direct HTTP port for each.

The direct port serves the very same engine through the same HTTP edge without lane or router: the floor that a router's
added latency is measured against, and a worker for other routers, with the pages of vLLM's server that they ask for.
Prints one JSON line when it listens, and ends when its standard input closes.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Awaitable
from typing import Any, Final

import uvloop

from engine.base import StreamOut
from engine.replica import Replica
from engine.simulated import SimulatedEngine
from router.errors import KvlaneError
from router.ingress.base import ModelStatus, Readiness
from router.ingress.http import HttpServer
from router.ingress.http_parser import HttpRequest
from router.ingress.http_response import Reply
from router.ingress.http_routes import Routes, Target
from router.lane.frames import End, Submit
from router.lane.tls import LaneTls, TlsFiles
from router.options import HttpOptions
from router.types import Headers, Reason, Receipt, Request, Sink

SECRET = b"load test"


class Direct:
    """Dispatch and fleet of one engine in the same process."""

    def __init__(self, engine: SimulatedEngine) -> None:
        self._engine = engine

    async def run(self, request: Request, sink: Sink) -> End:
        out = _Out(sink, asyncio.get_running_loop().create_future())
        sink.routed(Receipt(request.request_id, "direct", "none", Reason.ONLY_REPLICA, 0))
        call = Submit(1, request.request_id, request.rpc, request.method, request.path, request.headers, request.body)
        abort = self._engine.submit(call, out)
        try:
            return await out.done
        finally:
            abort()

    def models(self) -> tuple[ModelStatus, ...]:
        return tuple(ModelStatus(card, 1) for card in self._engine.info().models)

    def parent(self, model: str) -> str:
        return ""

    def methods(self, path: str) -> tuple[str, ...]:
        return next((route.methods for route in self._engine.info().routes if route.path == path), ())

    def readiness(self) -> Readiness:
        return Readiness(True, {})


class Pages(Routes):
    """The ingress's pages, and those of a single engine's server that other routers probe before they use it."""

    _PROBED: Final = {
        "/health": Reply(200, "text/plain; charset=utf-8", b""),
        "/version": Reply(200, "application/json", b'{"version":"0.0.0"}'),
    }

    def own(self, request: HttpRequest, target: Target) -> Reply | Awaitable[Reply] | None:
        return self._PROBED.get(target.path) or super().own(request, target)


class _Out(StreamOut):
    def __init__(self, sink: Sink, done: asyncio.Future[End]) -> None:
        self._sink = sink
        self.done = done

    def head(self, status: int, headers: Headers) -> None:
        self._sink.head(status, headers)

    def data(self, payload: bytes, tokens: int = 0, *, urgent: bool = False) -> None:
        try:
            self._sink.data(payload, tokens)
        except KvlaneError as error:
            self.fail(error)

    def end(self, finish: str = "") -> None:
        if not self.done.done():
            self.done.set_result(End(finish))

    def fail(self, error: KvlaneError) -> None:
        if not self.done.done():
            self.done.set_exception(error)


async def serve(model: str, replicas: int, engine_options: dict[str, Any], tls: LaneTls | None = None) -> None:
    """Runs the replicas until standard input closes."""
    started = []
    for number in range(replicas):
        engine = SimulatedEngine(engine_options, model)
        replica = Replica(f"sim-{number}", engine, SECRET)
        await replica.start()
        direct = Direct(engine)
        options = HttpOptions(port=0)
        pages = Pages(options, direct, lambda: (b"", "text/plain"), time.time, random.Random())
        http = HttpServer(
            options, direct, pages, clock=time.monotonic, wall=time.time, refused=lambda protocol, error: None
        )
        started.append((replica, http, await replica.listen("127.0.0.1", tls=tls), await http.start()))
    addresses = [{"replica": r.name, "lane": lane, "http": port} for r, _, lane, port in started]
    sys.stdout.write(json.dumps(addresses) + "\n")
    sys.stdout.flush()
    closed = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), closed.set)
    await closed.wait()
    for replica, http, _, _ in started:
        await http.stop(0)
        await replica.close()


if __name__ == "__main__":
    lane_tls = LaneTls("replica", TlsFiles(*sys.argv[4:])) if len(sys.argv) > 4 else None
    uvloop.run(serve(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), lane_tls))
