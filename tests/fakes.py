"""Fakes that several tests share: an engine under the test's control, a sink that remembers, a small router's parts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping

from engine.base import Abort, StreamOut
from engine.cache_report import CacheFeed
from engine.replica import Replica
from router.errors import ReplicaFailed
from router.lane.carriers import SocketCarrier
from router.lane.frames import Submit
from router.load.account import Blind, Foresight
from router.membership.base import ReplicaRecord
from router.options import LaneOptions
from router.replicas import CacheObserver, Replicas
from router.types import EngineInfo, Headers, Load, ModelCard, Receipt, Request, RouteInfo, Rpc

SECRET = b"0123456789abcdef0123456789abcdef"
DEADLINE_S = 10.0


class ScriptedEngine:
    """Does nothing by itself: the test writes each stream's output."""

    def __init__(self, model: str = "m", *, prefix_caching: bool = True, adapters: tuple[str, ...] = ()) -> None:
        self.model = model
        self.adapters = adapters
        self.feed: CacheFeed | None = None
        """Its cache reports; to be set before a lane opens."""
        self.prefix_caching = prefix_caching
        self.calls: list[Submit] = []
        self.outs: list[StreamOut] = []
        self.aborted: list[str] = []
        self.current_load = Load()
        self.is_dead = False
        self.closed = False
        self.submitted = asyncio.Event()
        self.step: Callable[[], None] = lambda: None
        self.respond: Callable[[Submit, StreamOut], None] | None = None
        """Answers each call at once where it is set."""

    async def start(self) -> None: ...

    def info(self) -> EngineInfo:
        routes = (RouteInfo("/v1/chat/completions", ("POST",)), RouteInfo("/v1/responses/{id}", ("GET",)))
        models = (ModelCard(self.model, "", 4096), *(ModelCard(name, self.model, 4096) for name in self.adapters))
        return EngineInfo("scripted", models, routes, 8, prefix_caching=self.prefix_caching)

    def load(self) -> Load:
        return self.current_load

    def busy(self, running: int) -> None:
        """So many requests run there from now on, and a step tells so."""
        self.current_load = Load(running=running)
        self.step()

    def on_step(self, listener: Callable[[], None]) -> None:
        self.step = listener

    def cache(self) -> CacheFeed | None:
        return self.feed

    def submit(self, call: Submit, out: StreamOut) -> Abort:
        self.calls.append(call)
        self.outs.append(out)
        self.submitted.set()
        if self.respond is not None:
            self.respond(call, out)
        return lambda: self.aborted.append(call.request_id)

    def dead(self) -> bool:
        return self.is_dead

    async def check_health(self) -> None:
        if self.is_dead:
            raise ReplicaFailed("the engine is dead")

    async def close(self) -> None:
        self.closed = True


class RecordingSink:
    """Remembers what came."""

    def __init__(self) -> None:
        self.started = False
        self.receipts: list[Receipt] = []
        self.heads: list[tuple[int, Headers]] = []
        self.payloads: list[bytes] = []
        self.tokens = 0
        self.got_data = asyncio.Event()
        self.error: Exception | None = None
        """Raised at the next data where it is set."""

    def routed(self, receipt: Receipt) -> None:
        self.receipts.append(receipt)

    def head(self, status: int, headers: Headers) -> None:
        self.heads.append((status, headers))

    def data(self, payload: bytes, tokens: int) -> None:
        if self.error is not None:
            raise self.error
        self.started = True
        self.payloads.append(payload)
        self.tokens += tokens
        self.got_data.set()


def make_request(request_id: str = "r1", model: str = "m", timeout_s: float | None = None) -> Request:
    """A request as an ingress would build it."""
    return Request(request_id, model, Rpc.HTTP, "/v1/chat/completions", b"{}", timeout_s=timeout_s)


class Fleet:
    """Replicas with scripted engines on loopback, and the router's `Replicas` with lanes to them."""

    def __init__(
        self,
        caches: CacheObserver | None = None,
        foresee: Callable[[EngineInfo], Foresight] = lambda info: Blind(),
        held: Collection[str] = (),
        **lane_options: float,
    ) -> None:
        self.engines: dict[str, ScriptedEngine] = {}
        self.replicas: dict[str, Replica] = {}
        self.records: dict[str, ReplicaRecord] = {}
        fast = {"reconnect_min_s": 0.01, "reconnect_max_s": 0.05}
        options = LaneOptions(**(fast | lane_options))  # type: ignore[arg-type]
        self.router = Replicas("test", SocketCarrier(), options, caches=caches, foresee=foresee, held=held)

    async def add(
        self,
        name: str,
        model: str = "m",
        secret: bytes = SECRET,
        *,
        prefix_caching: bool = True,
        adapters: tuple[str, ...] = (),
        feed: CacheFeed | None = None,
    ) -> ScriptedEngine:
        """Starts a replica and lists it."""
        engine = ScriptedEngine(model, prefix_caching=prefix_caching, adapters=adapters)
        engine.feed = feed
        replica = Replica(name, engine, SECRET)
        await replica.start()
        port = await replica.listen("127.0.0.1")
        self.engines[name], self.replicas[name] = engine, replica
        self.list({**self.records, name: ReplicaRecord(name, "127.0.0.1", port, secret)})
        return engine

    def list(self, records: Mapping[str, ReplicaRecord]) -> None:
        """Membership's part."""
        self.records = dict(records)
        self.router.listed(self.records)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits until the router's pools are as the condition wants."""
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                await self.router.wait_for_news()

    def ready(self, model: str = "m") -> int:
        """Ready replicas of the model."""
        return self.router.readiness().models.get(model, 0)

    async def close(self) -> None:
        await self.router.close()
        for replica in self.replicas.values():
            await replica.close()


async def eventually(condition: Callable[[], bool]) -> None:
    """Lets the loop run until the condition holds; fails after the deadline."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():
            await asyncio.sleep(0.001)
