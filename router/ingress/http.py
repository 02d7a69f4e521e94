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
from collections.abc import Callable, Sequence
from email.utils import formatdate
from typing import Final

from router.ingress.base import Dispatch, Fleet
from router.ingress.cors import Cors
from router.ingress.http_connection import Connection, Pages
from router.ingress.http_routes import Metrics, Routes
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
        self._servers: dict[int, asyncio.Server] = {}
        """By the descriptor of the socket that was given; 0 where the address was."""
        self._timer: asyncio.TimerHandle | None = None
        self._last_call = False
        self._stopping = False

    async def start(self) -> int:
        """Listens on the configured address; returns the port. Raises `OSError`."""
        self._begin()
        host, port = self.options.host, self.options.port
        loop = asyncio.get_running_loop()
        server = await loop.create_server(self._connect, host, port, backlog=_BACKLOG)
        self._servers[0] = server
        for listener in server.sockets:
            _keep_alive(listener)
        bound: int = server.sockets[0].getsockname()[1]
        return bound

    async def listen(self, socks: Sequence[socket.socket]) -> None:
        """Accepts connections on these sockets and on no others; they stay their owner's.

        Other processes may accept on them too: what waits there when this one ceases is theirs, and is not reset.
        """
        self._begin()
        loop = asyncio.get_running_loop()
        for number in self._servers.keys() - {sock.fileno() for sock in socks}:
            self._servers.pop(number).close()
        for sock in socks:
            if sock.fileno() not in self._servers:
                _keep_alive(sock)
                self._servers[sock.fileno()] = await loop.create_server(
                    self._connect, sock=sock.dup(), backlog=_BACKLOG
                )

    def _begin(self) -> None:
        if self._timer is None:
            self._stopping = False
            self._loop = asyncio.get_running_loop()
            self._tick(self._loop)

    def _connect(self) -> Connection:
        return Connection(self, self._loop)

    async def last_call(self) -> None:
        """Accepts nothing more, and returns when all connections have ended, each after one more request at most."""
        self._last_call = True
        await self.listen(())
        for connection in tuple(self._connections):
            connection.last_call()
        if self._connections:
            await self._empty.wait()

    async def stop(self, grace_s: float) -> None:
        """Accepts nothing more, lets responses under way finish for `grace_s` seconds, then ends them."""
        if self._timer is None:
            return
        self._stopping = True
        for server in self._servers.values():
            server.close()
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
        for server in self._servers.values():
            server.close()  # Waiting for the end of one that came meanwhile would have none.
            await server.wait_closed()
        self._servers.clear()
        self._timer.cancel()
        self._timer = None

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
        elif self._last_call:
            connection.last_call()
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
        metrics: Metrics,
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
