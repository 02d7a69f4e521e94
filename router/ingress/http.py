"""HTTP servers: a listener, its connections, and the one timer that watches their deadlines.

A server owns its connections and, through them, every request's task. Stopping it ends them all. `HttpIngress` is the
server of the OpenAI-compatible API; `router.ingress.admin` is another.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import Final

from router.ingress.base import Dispatch, Fleet
from router.ingress.cors import Cors
from router.ingress.http_connection import Connection, Pages
from router.ingress.http_routes import Routes
from router.options import HttpOptions

logger = logging.getLogger("kvlane.http")

SWEEP_INTERVAL_S: Final = 0.5
"""How late a deadline may be noticed."""
_BACKLOG: Final = 2048  # Connections that may arrive in one burst while the loop is busy.
_REFUSALS: Final = 256  # Connections above the limit that may be told so at one time; more are dropped unheard.
_FLUSH_S: Final = 1.0  # For the last words to connections that were ended.
_KEEPALIVE_IDLE_S: Final = 60  # A client whose host vanished is noticed by the kernel's probes after that.


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
    ) -> None:
        """`refused` is called with ``"http"`` and the error's name for each error answered without dispatch."""
        self.options = options
        self.dispatch = dispatch
        self.cors = Cors(options.cors_origins)
        self.routes = routes
        self.clock = clock
        self.refused = refused
        self._wall = wall
        self._date = ""
        self._connections: set[Connection] = set()
        self._orphans: set[asyncio.Task[None]] = set()
        self._empty = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._stopping = False

    async def start(self, sock: socket.socket | None = None, reuse_port: bool = False) -> int:
        """Listens on `sock`, else on the configured address; returns the port. Raises `OSError`."""
        loop = asyncio.get_running_loop()
        self._stopping = False

        def connect() -> Connection:
            return Connection(self, loop)

        if sock is None:
            host, port = self.options.host, self.options.port
            self._server = await loop.create_server(
                connect, host, port, reuse_port=reuse_port or None, backlog=_BACKLOG
            )
        else:
            self._server = await loop.create_server(connect, sock=sock, backlog=_BACKLOG)
        for listener in self._server.sockets:
            _keep_alive(listener)
        self._tick(loop)
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    async def stop(self, grace_s: float) -> None:
        """Accepts nothing more, lets responses under way finish for `grace_s` seconds, then ends them."""
        if self._server is None:
            return
        self._stopping = True
        self._server.close()
        for connection in tuple(self._connections):
            connection.retire()
        if not await self._emptied(grace_s) and self._connections:
            logger.info("cut %d connections that did not finish in time", len(self._connections))
            for connection in tuple(self._connections):
                connection.stop_short()
        if not await self._emptied(_FLUSH_S):
            for connection in tuple(self._connections):
                connection.abort()
        await self._empty.wait()
        await asyncio.gather(*self._orphans, return_exceptions=True)
        await self._server.wait_closed()
        self._server = None
        if self._timer is not None:
            self._timer.cancel()

    async def _emptied(self, limit_s: float) -> bool:
        if not self._connections:
            self._empty.set()
        try:
            async with asyncio.timeout(limit_s):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True

    @property
    def connections(self) -> int:
        """Connections open now."""
        return len(self._connections)

    def date(self) -> str:
        """The `date` and `server` lines of a response; made once per sweep."""
        return self._date

    def admit(self, connection: Connection) -> bool:
        """Counts the connection in; False where `max_connections` are open already.

        One that was accepted just before `stop` began arrives after it, and is closed unheard.
        """
        limit = self.options.max_connections
        self._connections.add(connection)
        self._empty.clear()
        if self._stopping:
            connection.retire()
        if len(self._connections) > limit + _REFUSALS:
            connection.abort()
        return len(self._connections) <= limit

    def leave(self, connection: Connection) -> None:
        """The connection is lost."""
        self._connections.discard(connection)
        if not self._connections:
            self._empty.set()

    def adopt(self, task: asyncio.Task[None]) -> None:
        """Keeps a cancelled task until it has ended."""
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
        metrics: Callable[[], tuple[bytes, str]],
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        chance: random.Random | None = None,
        refused: Callable[[str, str], None] = lambda rpc, error: None,
    ) -> None:
        routes = Routes(options, fleet, metrics, wall, chance or random.Random())
        super().__init__(options, dispatch, routes, clock=clock, wall=wall, refused=refused)


def _keep_alive(listener: socket.socket) -> None:
    """Turns TCP keep-alive on for what this socket accepts (Linux hands these options down)."""
    if listener.family in (socket.AF_INET, socket.AF_INET6):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_S)
