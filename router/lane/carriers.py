"""The seam for carriers: what moves a lane's bytes.

A carrier opens an ordered pipe of bytes to a replica as an asyncio transport, so a lane is an `asyncio.Protocol` and
never knows what is underneath. `socket` is TCP; `actor` (in `router.lane.actor`) is calls on the replica's Ray actor.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from typing import Protocol

from router.lane.tls import SHUTDOWN_TIMEOUT_S, LaneTls, explain
from router.membership.base import ReplicaRecord


class Carrier(Protocol):
    """Opens pipes to replicas."""

    async def connect(self, record: ReplicaRecord, protocol: Callable[[], asyncio.Protocol]) -> asyncio.BaseTransport:
        """Opens a pipe to the replica and connects the protocol to it. Raises `OSError` where that fails."""


class TlsFailed(ConnectionError):
    """The two sides do not agree on TLS, or one does not trust the other."""


class SocketCarrier:
    """TCP straight to the replica's lane port, with TLS where it is configured."""

    def __init__(self, tls: LaneTls | None = None) -> None:
        self._tls = tls

    async def connect(self, record: ReplicaRecord, protocol: Callable[[], asyncio.Protocol]) -> asyncio.BaseTransport:
        loop = asyncio.get_running_loop()
        if self._tls is not None:
            transport = await _connect_tls(self._tls, record, protocol)
        elif record.tls:
            raise TlsFailed("it speaks TLS, and this router has no lane.tls_ca_file")
        else:
            transport, _ = await loop.create_connection(protocol, record.host, record.port)
        tune(transport)
        return transport


async def _connect_tls(
    tls: LaneTls, record: ReplicaRecord, protocol: Callable[[], asyncio.Protocol]
) -> asyncio.BaseTransport:
    try:
        transport, _ = await asyncio.get_running_loop().create_connection(
            protocol,
            record.host,
            record.port,
            ssl=tls.context(),
            server_hostname=tls.server_name or record.host,
            ssl_shutdown_timeout=SHUTDOWN_TIMEOUT_S,
        )
    except ssl.SSLError as error:
        raise TlsFailed(explain(error)) from error
    return transport


def tune(transport: asyncio.BaseTransport) -> None:
    """Turns Nagle's algorithm off: a step frame must never wait for the acknowledgement of the one before."""
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
