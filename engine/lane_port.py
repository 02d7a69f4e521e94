"""The TCP port of the `socket` carrier, with TLS where it is configured.

Rule: a session begins only behind a handshake that holds, and what fails before is counted and logged. With TLS
connections are therefore accepted here one by one, which also gives each the certificates of its time. `LanePort` owns
the server and the handshakes under way.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from router.errors import ConfigError
from router.lane.tls import SHUTDOWN_TIMEOUT_S, LaneTls, explain
from router.options import LANE_PORTS

log = logging.getLogger(__name__)

BACKLOG: Final = 1024
HANDSHAKE_TIMEOUT_S: Final = 5.0
HANDSHAKES: Final = 256
"""At once; each costs the engine's event loop about a millisecond."""
ACCEPT_PAUSE_S: Final = 1.0
"""After a connection could not be accepted, for want of file descriptors mostly."""

Refused = Callable[[str, Any, str], None]
"""Takes a code, the peer's address and a message."""


class LanePort:
    """One replica's port."""

    def __init__(self, session: Callable[[], asyncio.Protocol], refused: Refused, tls: LaneTls | None = None) -> None:
        self._session = session
        self._refused = refused
        self._tls = tls
        self._server: asyncio.Server | None = None
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._handshakes: dict[asyncio.Task[None], socket.socket] = {}
        self._closing = False

    async def open(self, host: str, port: int) -> int:
        """Listens on `port`, or the first free one of `LANE_PORTS` from there on, 0 takes any; returns which it is.

        Raises `ConfigError` where none is free, and `OSError` where the address cannot be used.
        """
        for candidate in range(port, port + LANE_PORTS if port else 1):
            try:
                return await self._open(host, candidate)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
        raise ConfigError(f"engines.lane_port: none of {port} to {port + LANE_PORTS - 1} is free on {host}")

    async def close(self) -> None:
        """Accepts nothing more, and ends handshakes; lanes that are open stay."""
        self._closing = True
        if self._server is not None:
            self._server.close()
        tasks = list(self._handshakes)
        for sock in self._handshakes.values():
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # uvloop keeps a connection whose handshake is cancelled as it begins.
        if self._accepting is not None:
            self._accepting.cancel()
            tasks.append(self._accepting)
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()

    async def _open(self, host: str, port: int) -> int:
        loop = asyncio.get_running_loop()
        bound: int
        if self._tls is None:
            self._server = await loop.create_server(self._session, host, port, backlog=BACKLOG)
            bound = self._server.sockets[0].getsockname()[1]
            return bound
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
        listener.setblocking(False)
        bound = listener.getsockname()[1]
        self._accepting = asyncio.create_task(self._accept(listener), name="accepting lanes")
        return bound

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, peer = await loop.sock_accept(listener)
            except OSError as error:
                log.error("a lane could not be accepted: %s", error.strerror)
                await asyncio.sleep(ACCEPT_PAUSE_S)
                continue
            if len(self._handshakes) >= HANDSHAKES:
                sock.close()
                self._refused("busy", peer, f"{HANDSHAKES} handshakes are under way")
                continue
            task = asyncio.create_task(self._secure(sock, peer), name="handshake of a lane")
            self._handshakes[task] = sock
            task.add_done_callback(self._handshakes.pop)

    async def _secure(self, sock: socket.socket, peer: Any) -> None:
        assert self._tls is not None
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                self._session,
                sock,
                ssl=self._tls.context(),
                ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S,
                ssl_shutdown_timeout=SHUTDOWN_TIMEOUT_S,
            )
        except OSError as error:
            if not self._closing:
                self._refused("tls", peer, explain(error))
