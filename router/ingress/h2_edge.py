"""The gRPC edge of our own: a listener, its HTTP/2 connections, and the one timer that watches their deadlines.

It owns its connections and every handler's task. Stopping it ends them all.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import grpc

from router.errors import ConfigError, KvlaneError
from router.ingress.arrivals import Door
from router.ingress.grpc_call import Call, Handler
from router.ingress.grpc_health import Methods
from router.ingress.grpc_port import address
from router.ingress.h2_call import H2Call
from router.ingress.h2_connection import CLOSE_S, Connection
from router.ingress.h2_servicers import served
from router.ingress.pace import Pace
from router.ingress.reception import BACKLOG, Reception
from router.ingress.tls import Tls
from router.options import GrpcOptions

log = logging.getLogger(__name__)

SWEEP_INTERVAL_S: Final = 0.5
"""How late a deadline may be noticed."""
CALLS_PER_TURN: Final = 8
"""Of all connections together; one takes twice as long as an HTTP request. Those given up count."""
FLUSH_S: Final = 0.5
"""For the last words to connections that were cut."""


class H2Edge:
    """See `grpc_call.Edge`."""

    def __init__(
        self,
        options: GrpcOptions,
        service: str,
        handlers: Mapping[str, Handler],
        standard: Mapping[str, Methods],
        *,
        reuse_port: bool,
        tls: Tls | None = None,
        handshake_refused: Callable[[str, str], None] = lambda section, reason: None,
    ) -> None:
        """`handlers` are the service's own, `standard` are grpc's servicers by service name."""
        self.options = options
        self.pace = Pace(CALLS_PER_TURN)
        self._handlers = {f"/{service}/{name}": handler for name, handler in handlers.items()}
        for other, methods in standard.items():
            for name, method in methods.items():
                self._handlers[f"/{other}/{name}"] = served(method, options)
        self._reuse_port = reuse_port
        self._reception: Reception[Connection] = Reception(self._open)
        self._connections = self._reception.guests
        self._tasks: set[asyncio.Task[None]] = set()
        self._tls = tls
        self._handshake_refused = handshake_refused
        self._timer: asyncio.TimerHandle | None = None

    async def start(self) -> int:
        """Listens; returns the port bound. Raises `ConfigError` where the address cannot be used."""
        options = self.options
        self._begin()
        try:
            return await self._reception.open(options.host, options.port)
        except OSError as error:
            raise ConfigError(f"the gRPC ingress cannot listen on {address(options)}: {error}") from error

    async def listen(self, socks: Sequence[socket.socket]) -> None:
        """As `Edge.listen`."""
        self._begin()
        await self._reception.listen(socks)

    def _begin(self) -> None:
        if self._timer is None:
            self._reception.begin()
            self._tick(asyncio.get_running_loop())

    async def _open(self, **where: Any) -> asyncio.Server:
        loop = asyncio.get_running_loop()
        if "sock" not in where and self._reuse_port:
            where["reuse_port"] = True
        if self._tls is None:
            return await loop.create_server(lambda: Connection(self, loop), backlog=BACKLOG, **where)
        door = Door(
            self._tls,
            self._reception,
            lambda _: Connection(self, loop),
            limit=self.options.max_connections,
            shutdown_s=CLOSE_S,
            refused=self._handshake_refused,
        )
        return await loop.create_server(door.arrival, backlog=BACKLOG, **where)

    def notice(self, limit_s: float) -> None:
        """As `Edge.notice`."""
        self._reception.notice(limit_s)

    async def last_call(self) -> None:
        """As `Edge.last_call`."""
        await self._reception.last_call()

    async def stop(self, grace_s: float) -> None:
        """As `Edge.stop`."""
        if self._timer is None:
            return
        await self._reception.stop(grace_s, FLUSH_S)
        if self._tasks:
            await asyncio.wait(tuple(self._tasks))
        self._timer.cancel()

    @property
    def connections(self) -> int:
        """As `Edge.connections`."""
        return len(self._connections)

    @property
    def abandoned(self) -> bool:
        """As `Edge.abandoned`."""
        return any(call.abandoned for connection in self._connections for call in connection.calls.values())

    # -- for connections

    def admit(self, connection: Connection) -> bool:
        """See `h2_site.Site`."""
        reception = self._reception
        return reception.admit(connection) <= self.options.max_connections or reception.make_room()

    def dismiss(self, connection: Connection) -> None:
        """See `h2_site.Site`."""
        self._reception.dismiss(connection)

    def leave(self, connection: Connection) -> None:
        """See `h2_site.Site`."""
        self._reception.leave(connection)

    def handler(self, path: str) -> Handler:
        """See `h2_site.Site`."""
        return self._handlers.get(path, self._unknown)

    async def _unknown(self, call: Call) -> None:
        # Clients that are told before they have sent their message may report their failed write instead.
        try:
            async with asyncio.timeout(self.options.request_timeout_s):
                await call.read()
        except (TimeoutError, KvlaneError):
            pass  # They need no other reason.
        await call.fail(grpc.StatusCode.UNIMPLEMENTED, "there is no such method", ())

    def begin(self, call: H2Call, handler: Handler) -> asyncio.Task[None]:
        """See `h2_site.Site`."""
        task = asyncio.get_running_loop().create_task(_handled(call, handler))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = loop.call_later(SWEEP_INTERVAL_S, self._tick, loop)
        now = loop.time()
        for connection in tuple(self._connections):
            connection.sweep(now)


async def _handled(call: H2Call, handler: Handler) -> None:
    call.begun = True
    try:
        await handler(call)
        call.finish()
    except asyncio.CancelledError:
        # Its client is gone. As the task's outcome, the error would keep every frame of it for the garbage collector.
        return
    except Exception:
        log.exception("a defect in the gRPC ingress or behind it")
        await call.fail(grpc.StatusCode.INTERNAL, "internal error")
