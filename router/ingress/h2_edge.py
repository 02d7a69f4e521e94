"""The gRPC edge of our own: a listener, its HTTP/2 connections, and the one timer that watches their deadlines.

It owns its connections and every handler's task. Stopping it ends them all.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Mapping, Sequence
from typing import Any, Final

import grpc

from router.errors import ConfigError, KvlaneError
from router.ingress.grpc_call import Call, Handler
from router.ingress.grpc_health import Methods
from router.ingress.grpc_port import address, tls_context
from router.ingress.h2_call import H2Call
from router.ingress.h2_connection import CLOSE_S, HANDSHAKE_S, Connection
from router.ingress.h2_servicers import served
from router.options import GrpcOptions

log = logging.getLogger(__name__)

SWEEP_INTERVAL_S: Final = 0.5
"""How late a deadline may be noticed."""
FLUSH_S: Final = 0.5
"""For the last words to connections that were cut."""
_BACKLOG: Final = 2048  # Connections that may arrive in one burst while the loop is busy.


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
    ) -> None:
        """`handlers` are the service's own, `standard` are grpc's servicers by service name."""
        self.options = options
        self._handlers = {f"/{service}/{name}": handler for name, handler in handlers.items()}
        for other, methods in standard.items():
            for name, method in methods.items():
                self._handlers[f"/{other}/{name}"] = served(method, options)
        self._reuse_port = reuse_port
        self._connections: set[Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._empty = asyncio.Event()
        self._servers: dict[int, asyncio.Server] = {}
        """By the descriptor of the socket that was given; 0 where the address was."""
        self._tls: ssl.SSLContext | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._last_call = False
        self._stopping = False

    async def start(self) -> int:
        """Listens; returns the port bound. Raises `ConfigError` where address or TLS files cannot be used."""
        options = self.options
        self._begin()
        try:
            server = await self._server(host=options.host, port=options.port, reuse_port=self._reuse_port or None)
        except OSError as error:
            raise ConfigError(f"the gRPC ingress cannot listen on {address(options)}: {error}") from error
        self._servers[0] = server
        bound: int = server.sockets[0].getsockname()[1]
        return bound

    async def listen(self, socks: Sequence[socket.socket]) -> None:
        """As `Edge.listen`. Raises `ConfigError` for TLS files that cannot be used."""
        self._begin()
        for number in self._servers.keys() - {sock.fileno() for sock in socks}:
            self._servers.pop(number).close()
        for sock in socks:
            if sock.fileno() not in self._servers:
                self._servers[sock.fileno()] = await self._server(sock=sock.dup())

    def _begin(self) -> None:
        if self._timer is None:
            self._tls = tls_context(self.options)
            self._tick(asyncio.get_running_loop())

    async def _server(self, **where: Any) -> asyncio.Server:
        tls, loop = self._tls, asyncio.get_running_loop()
        return await loop.create_server(
            lambda: Connection(self, loop),
            ssl=tls,
            ssl_handshake_timeout=HANDSHAKE_S if tls else None,
            ssl_shutdown_timeout=CLOSE_S if tls else None,
            backlog=_BACKLOG,
            **where,
        )

    async def last_call(self) -> None:
        """As `Edge.last_call`."""
        self._last_call = True
        await self.listen(())
        for connection in tuple(self._connections):
            connection.last_call()
        if self._connections:
            await self._empty.wait()

    async def stop(self, grace_s: float) -> None:
        """As `Edge.stop`."""
        if self._timer is None:
            return
        if not self._stopping:
            self._stopping = True
            for server in self._servers.values():
                server.close()
            for connection in tuple(self._connections):
                connection.drain()
        if not await self._emptied(grace_s):
            for connection in tuple(self._connections):
                connection.cut()
        if not await self._emptied(FLUSH_S):
            for connection in tuple(self._connections):
                connection.abort()
            await self._empty.wait()
        if self._tasks:
            await asyncio.wait(tuple(self._tasks))
        for server in self._servers.values():
            await server.wait_closed()
        self._timer.cancel()

    @property
    def abandoned(self) -> bool:
        """As `Edge.abandoned`."""
        return any(call.abandoned for connection in self._connections for call in connection.calls.values())

    # -- for connections

    def admit(self, connection: Connection) -> bool:
        """See `h2_site.Site`."""
        self._connections.add(connection)
        self._empty.clear()
        if self._stopping:
            connection.drain()
        elif self._last_call:
            connection.last_call()
        return len(self._connections) <= self.options.max_connections

    def leave(self, connection: Connection) -> None:
        """See `h2_site.Site`."""
        self._connections.discard(connection)
        if not self._connections:
            self._empty.set()

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

    async def _emptied(self, limit_s: float) -> bool:
        if not self._connections:
            self._empty.set()
        try:
            async with asyncio.timeout(limit_s):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = loop.call_later(SWEEP_INTERVAL_S, self._tick, loop)
        now = loop.time()
        for connection in tuple(self._connections):
            connection.sweep(now)


async def _handled(call: H2Call, handler: Handler) -> None:
    try:
        await handler(call)
        call.finish()
    except asyncio.CancelledError:
        # Its client is gone. As the task's outcome, the error would keep every frame of it for the garbage collector.
        return
    except Exception:
        log.exception("a defect in the gRPC ingress or behind it")
        await call.fail(grpc.StatusCode.INTERNAL, "internal error")
