"""Connections to a TLS port until their handshake is done.

Rule: a handshake is bounded in time, counts as a connection, and is told when it fails: to the client by TLS's own
alert, to the log and a metric by its cause. Nothing of a server is made for a client before its handshake.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar, cast

from router.ingress.reception import Reception
from router.ingress.refusals import RefusalLog
from router.ingress.tls import Handshake, Tls, reason_of

log = logging.getLogger(__name__)

HANDSHAKE_S: Final = 10.0
_EARLY_BYTES: Final = 1 << 20  # In the one turn of the loop before a handshake begins, or before its end is known.
_WRITE_BYTES: Final = 64 << 10  # Unread output at which a client counts as slow, as without TLS.
_HTTP_HINT: Final = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\ncontent-length: 32\r\nconnection: close\r\n\r\n"
    b"This port speaks TLS: use https\n"
)

G = TypeVar("G", bound=Any)


class Door(Generic[G]):
    """The handshakes of one server."""

    def __init__(
        self,
        tls: Tls,
        reception: Reception[G],
        open_connection: Callable[[asyncio.Transport], G],
        *,
        limit: int,
        shutdown_s: float,
        refused: Callable[[str, str], None],
    ) -> None:
        """`open_connection` makes the protocol of a client whose handshake is done, over the transport beneath TLS.

        No more than `limit` connections and handshakes are open at one time. A client that is told the end has
        `shutdown_s` to say so too. `refused` is called with the section and the cause of each failed handshake.
        """
        self.tls = tls
        self.reception = reception
        self.open_connection = open_connection
        self.shutdown_s = shutdown_s
        self._limit = limit
        self._refused = refused
        self._log = RefusalLog()

    def arrival(self) -> Arrival[G]:
        """The protocol of a new connection."""
        return Arrival(self)

    def welcome(self, arrival: asyncio.Task[None]) -> bool:
        """Whether there is room for it."""
        if self.reception.present >= self._limit and not self.reception.make_room():
            self.refuse("too_many", "")
            return False
        return self.reception.expect(arrival)

    def refuse(self, reason: str, client: str) -> None:
        """Counts a failed handshake, and logs it."""
        self._refused(self.tls.section, reason)
        self._log.tell("refused a TLS handshake at the %s port%s: %s", self.tls.section, client, reason)


class Arrival(asyncio.Protocol, Generic[G]):
    """One connection that is to become a client's."""

    def __init__(self, door: Door[G]) -> None:
        self._door = door
        self._early = b""
        """What came before the handshake began, and in the very read that ended it."""
        self._shaking: Handshake | None = None
        self._over = False
        """Refused, or lost."""
        self._told = False
        """TLS has failed, and that is counted."""
        self._through = False
        """Its client has its connection."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._beneath = cast("asyncio.Transport", transport)  # uvloop's are none by type.
        task = asyncio.get_running_loop().create_task(self._arrive())
        task.add_done_callback(self._ended)
        if not self._door.welcome(task):
            self._over = True
            task.cancel()
            self._beneath.abort()

    def data_received(self, data: bytes) -> None:
        self._early += data
        if len(self._early) > _EARLY_BYTES:
            self._beneath.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._over = True

    async def _arrive(self) -> None:
        if self._over:
            return
        door, loop = self._door, asyncio.get_running_loop()
        context = door.tls.context
        context.shakers.append(self)
        try:
            transport = await loop.start_tls(
                self._beneath,
                self,
                context,
                server_side=True,
                ssl_handshake_timeout=HANDSHAKE_S,
                ssl_shutdown_timeout=door.shutdown_s,
            )
        except (OSError, RuntimeError) as error:  # TLS, the timeout, a transport that is closed already.
            self._lost(error)
            return
        finally:
            if self in context.shakers:
                context.shakers.remove(self)
        # A connection that is lost meanwhile looks like one whose handshake is done.
        if self._over or transport is None or transport.get_extra_info("ssl_object") is None:
            return
        transport.set_write_buffer_limits(high=_WRITE_BYTES)
        guest = door.open_connection(self._beneath)
        transport.set_protocol(guest)
        self._through = True
        guest.connection_made(transport)
        if self._early:
            guest.data_received(self._early)

    def began(self, shaking: Handshake, incoming: ssl.MemoryBIO) -> None:
        """See `tls.Shaker`."""
        self._shaking = shaking
        incoming.write(self._early)
        self._early = b""

    def failed(self, error: ssl.SSLError) -> None:
        """See `tls.Shaker`."""
        self._over = self._told = True
        self._door.refuse(reason_of(error), self._client())
        if error.reason == "HTTP_REQUEST":
            self._beneath.write(_HTTP_HINT)
        asyncio.get_running_loop().call_soon(self._beneath.close)  # Behind what there is to say.

    def _lost(self, error: Exception) -> None:
        if not self._told and isinstance(error, ConnectionAbortedError):
            self._door.refuse("timeout", self._client())

    def _client(self) -> str:
        where = self._beneath.get_extra_info("peername")
        return f" from {where[0]}" if isinstance(where, tuple) else ""

    def _ended(self, task: asyncio.Task[None]) -> None:
        if self._shaking is not None:
            self._shaking.shaker = None  # They would hold each other.
            self._shaking = None
        if not self._through:
            self._beneath.abort()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a defect in the handling of TLS handshakes", exc_info=error)
