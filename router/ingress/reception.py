"""Who a server lets in: the sockets that it listens on, and its connections until the last of them has gone.

Rule: a socket may be shared with other processes, so ceasing to listen touches nothing that waits there; and nobody is
cut off who was not told before. Both HTTP and gRPC of our own have one.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Generic, Protocol, TypeVar

log = logging.getLogger(__name__)

BACKLOG: Final = 2048
"""Connections that may arrive in one burst while the loop is busy."""
_KEEPALIVE_IDLE_S: Final = 60
"""A client whose host vanished is noticed by the kernel's probes after that."""


class Guest(Protocol):
    """A connection."""

    def notice(self, limit_s: float) -> None:
        """The server goes away after that time: its client shall make its next requests elsewhere. All are served."""

    def last_call(self) -> None:
        """Its client shall make its next requests elsewhere; those made before it knows are still served."""

    def retire(self) -> None:
        """No further requests: ends when those under way are over."""

    def stop_short(self) -> None:
        """Ends what is under way with an error, and then the connection."""

    def abort(self) -> None:
        """Drops the connection, unread output and all."""


G = TypeVar("G", bound=Guest)


class Reception(Generic[G]):
    """A server's. `open_server` is called with ``sock``, or with ``host`` and ``port``, and makes the guests."""

    def __init__(self, open_server: Callable[..., Awaitable[asyncio.Server]]) -> None:
        self.guests: set[G] = set()
        self._dismissed: dict[G, None] = {}
        """Those of the guests that are only there to read why they are sent away; the first to be so comes first."""
        self._open = open_server
        self._servers: dict[int, asyncio.Server] = {}
        """By the descriptor of the socket that was given; 0 where an address was."""
        self._arriving: set[asyncio.Task[None]] = set()
        """Handshakes, each of which may bring a guest."""
        self._empty = asyncio.Event()
        self._leaves_at = math.inf
        self._last_call = False
        self._stopping = False

    def begin(self) -> None:
        """Before anything is listened on, and anew after a stop."""
        self._stopping = False

    async def open(self, host: str, port: int) -> int:
        """Listens on an address; returns the port. Raises `OSError`."""
        server = self._servers[0] = await self._open(host=host, port=port)
        for listener in server.sockets:
            _keep_alive(listener)
        bound: int = server.sockets[0].getsockname()[1]
        return bound

    async def listen(self, socks: Sequence[socket.socket]) -> None:
        """Accepts connections on these sockets and on no others; they stay their owner's."""
        for number in self._servers.keys() - {sock.fileno() for sock in socks}:
            self._servers.pop(number).close()
        for sock in socks:
            if sock.fileno() not in self._servers:
                _keep_alive(sock)
                server = await self._open(sock=sock.dup())
                if self._stopping:  # Nobody would close it any more.
                    server.close()
                else:
                    self._servers[sock.fileno()] = server

    def notice(self, limit_s: float) -> None:
        """Goes on accepting, and tells all guests, those that are to come too, that it stops after that time."""
        self._leaves_at = asyncio.get_running_loop().time() + limit_s
        for guest in tuple(self.guests):
            guest.notice(limit_s)

    async def last_call(self) -> None:
        """Accepts nothing more, tells all guests, and returns when they have gone."""
        self._last_call = True
        await self.listen(())
        for guest in tuple(self.guests):
            guest.last_call()
        if self.present:
            await self._empty.wait()

    async def stop(self, grace_s: float, flush_s: float) -> None:
        """Accepts nothing more, and returns when all guests have gone.

        After `grace_s` seconds they are stopped short, and `flush_s` later dropped. Called again while it runs, it
        shortens the grace.
        """
        if not self._stopping:
            self._stopping = True
            for server in self._servers.values():
                server.close()
            for guest in tuple(self.guests):
                guest.retire()
            for arrival in self._arriving:
                arrival.cancel()
        if not await self._emptied(grace_s):
            log.info("cut %d connections that did not finish in time", len(self.guests))
            for guest in tuple(self.guests):
                guest.stop_short()
        if not await self._emptied(flush_s):
            for guest in tuple(self.guests):
                guest.abort()
            await self._empty.wait()
        while self._servers:
            _, server = self._servers.popitem()
            await server.wait_closed()

    async def _emptied(self, limit_s: float) -> bool:
        if not self.present:
            self._empty.set()
        try:
            async with asyncio.timeout(limit_s):
                await self._empty.wait()
        except TimeoutError:
            return not self.present
        return True

    @property
    def present(self) -> int:
        """Guests, and those that may become guests."""
        return len(self.guests) + len(self._arriving)

    def expect(self, arrival: asyncio.Task[None]) -> bool:
        """A guest may come of this task, whose end is waited for as for a guest's; False where a stop has begun."""
        if self._stopping:
            return False
        self._arriving.add(arrival)
        self._empty.clear()
        arrival.add_done_callback(self._arrived)
        return True

    def _arrived(self, arrival: asyncio.Task[None]) -> None:
        self._arriving.discard(arrival)
        if not self.present:
            self._empty.set()

    def admit(self, guest: G) -> int:
        """A guest came in; returns how many there are now.

        One that was accepted just before a stop began arrives after it, and is told at once.
        """
        self.guests.add(guest)
        self._empty.clear()
        if self._stopping:
            guest.retire()
        elif self._last_call:
            guest.last_call()
        elif self._leaves_at < math.inf:
            guest.notice(self._leaves_at - asyncio.get_running_loop().time())
        return len(self.guests)

    def dismiss(self, guest: G) -> None:
        """A guest is sent away for its own fault, and has only to read why."""
        if guest in self.guests:
            self._dismissed[guest] = None

    def make_room(self) -> bool:
        """Drops the guest that was dismissed first, for one that is too many; False where there is none."""
        for guest in self._dismissed:
            del self._dismissed[guest]
            guest.abort()
            return True
        return False

    def leave(self, guest: G) -> None:
        """A guest has gone."""
        self.guests.discard(guest)
        self._dismissed.pop(guest, None)
        if not self.present:
            self._empty.set()


def _keep_alive(listener: socket.socket) -> None:
    """Turns TCP keep-alive on for what this socket accepts (Linux hands these options down)."""
    if listener.family in (socket.AF_INET, socket.AF_INET6):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_S)
