"""HTTP servers: a listener, its connections, and the one timer that watches their deadlines.

A server owns its connections and, through them, every request's task. Stopping it ends them all. `HttpIngress` is the
server of the OpenAI-compatible API; `router.ingress.admin` is another.
"""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import Callable, Sequence
from email.utils import formatdate
from typing import Any, Final

from router.ingress.arrivals import Door
from router.ingress.base import Dispatch, Fleet
from router.ingress.cors import Cors
from router.ingress.gate import Gate
from router.ingress.http_connection import Connection, Pages
from router.ingress.http_routes import Metrics, Routes
from router.ingress.pace import Pace
from router.ingress.reception import BACKLOG, Reception
from router.ingress.tls import server_tls
from router.options import HttpOptions

SWEEP_INTERVAL_S: Final = 0.5
"""How late a deadline may be noticed."""
READS_PER_TURN: Final = 16
"""Of all connections together, those who leave too; a small request takes some 0.1 ms, with what follows from it."""
_REFUSALS: Final = 256  # Connections above the limit that may be told so at one time; more are dropped unheard.
_CLOSING_S: Final = 3600.0  # Over TLS; a connection's own deadlines, which see whether its client reads, end it sooner.
_FLUSH_S: Final = 1.0  # For the last words to connections that were ended.


class HttpServer:
    """Serves HTTP/1.1 on one socket."""

    def __init__(
        self,
        options: HttpOptions,
        dispatch: Dispatch,
        routes: Pages,
        *,
        clock: Callable[[], float],
        wall: Callable[[], float],
        refused: Callable[[str, str], None],
        handshake_refused: Callable[[str, str], None] = lambda section, reason: None,
    ) -> None:
        """`refused` is called with ``"http"`` and the error's name for each error answered without dispatch,
        `handshake_refused` with ``"http"`` and the cause. Raises `ConfigError` for TLS files that cannot be used."""
        self.options = options
        self.dispatch = dispatch
        self.cors = Cors(options.cors_origins)
        self.routes = routes
        self.clock = clock
        self.refused = refused
        self.pace = Pace(READS_PER_TURN)
        self._wall = wall
        self._date = ""
        self.tls = server_tls("http", options, ["http/1.1"])
        self._handshake_refused = handshake_refused
        self._reception: Reception[Connection] = Reception(self._open)
        self._connections = self._reception.guests
        self._orphans: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def start(self) -> int:
        """Listens on the configured address; returns the port. Raises `OSError`."""
        self._begin()
        return await self._reception.open(self.options.host, self.options.port)

    async def listen(self, socks: Sequence[socket.socket]) -> None:
        """Accepts connections on these sockets and on no others; they stay their owner's.

        Other processes may accept on them too: what waits there when this one ceases is theirs, and is not reset.
        """
        self._begin()
        await self._reception.listen(socks)

    def _begin(self) -> None:
        if self._timer is None:
            self._reception.begin()
            self._tick(asyncio.get_running_loop())

    async def _open(self, **where: Any) -> asyncio.Server:
        loop = asyncio.get_running_loop()
        if self.tls is None:
            return await loop.create_server(lambda: Connection(self, loop), backlog=BACKLOG, **where)
        door = Door(
            self.tls,
            self._reception,
            lambda beneath: Connection(self, loop, beneath),
            limit=self.options.max_connections,
            shutdown_s=_CLOSING_S,
            refused=self._handshake_refused,
        )
        return await loop.create_server(door.arrival, backlog=BACKLOG, **where)

    def notice(self, limit_s: float) -> None:
        """It stops after that time: unready, it serves on, and answers ask clients to go elsewhere."""
        self.routes.leave()
        self._reception.notice(limit_s)

    async def last_call(self) -> None:
        """Accepts nothing more, and returns when all connections have ended, each after one more request at most."""
        await self._reception.last_call()

    async def stop(self, grace_s: float) -> None:
        """Accepts nothing more, lets responses under way finish for `grace_s` seconds, then ends them."""
        if self._timer is None:
            return
        await self._reception.stop(grace_s, _FLUSH_S)
        await asyncio.gather(*self._orphans, return_exceptions=True)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    @property
    def connections(self) -> int:
        """Connections open now."""
        return len(self._connections)

    def date(self) -> str:
        """The `date` and `server` lines of a response; made once per sweep."""
        return self._date

    def admit(self, connection: Connection) -> bool:
        """Counts the connection in; False where `max_connections` are open already."""
        limit, there = self.options.max_connections, self._reception.admit(connection)
        if there > limit + _REFUSALS:
            connection.abort()
        return there <= limit

    def leave(self, connection: Connection) -> None:
        """The connection is lost."""
        self._reception.leave(connection)

    def adopt(self, task: asyncio.Task[None]) -> None:
        """Keeps a task that is cancelled, or is about to be, until it has ended."""
        self._orphans.add(task)
        task.add_done_callback(self._orphans.discard)

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = loop.call_later(SWEEP_INTERVAL_S, self._tick, loop)
        self.sweep()

    def sweep(self) -> None:
        """Ends what has waited too long. Runs by itself; a look at 10,000 connections takes about a millisecond."""
        self._date = f"date: {formatdate(self._wall(), usegmt=True)}\r\nserver: kvlane\r\n"
        now = self.clock()
        for connection in [each for each in self._connections if each.deadline <= now]:
            connection.expired()


class HttpIngress(HttpServer):
    """The OpenAI-compatible API. `metrics` returns the body of ``/metrics`` and its content type."""

    def __init__(
        self,
        options: HttpOptions,
        dispatch: Dispatch,
        fleet: Fleet,
        *,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        chance: random.Random | None = None,
        refused: Callable[[str, str], None] = lambda rpc, error: None,
        handshake_refused: Callable[[str, str], None] = lambda section, reason: None,
        gate: Gate | None = None,
    ) -> None:
        routes = Routes(options, fleet, metrics, wall, chance or random.Random(), gate)
        super().__init__(
            options,
            dispatch,
            routes,
            clock=clock,
            wall=wall,
            refused=refused,
            handshake_refused=handshake_refused,
        )
