"""The seam for carriers: what moves a lane's bytes.

A carrier opens an ordered pipe of bytes to a replica as an asyncio transport, so a lane is an `asyncio.Protocol` and
never knows what is underneath. `socket` is TCP; `actor` (in `router.lane.actor`) is calls on the replica's Ray actor.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Protocol

from router.membership.base import ReplicaRecord


class Carrier(Protocol):
    """Opens pipes to replicas."""

    async def connect(self, record: ReplicaRecord, protocol: Callable[[], asyncio.Protocol]) -> asyncio.BaseTransport:
        """Opens a pipe to the replica and connects the protocol to it. Raises `OSError` where that fails."""


class SocketCarrier:
    """TCP straight to the replica's lane port."""

    async def connect(self, record: ReplicaRecord, protocol: Callable[[], asyncio.Protocol]) -> asyncio.BaseTransport:
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(protocol, record.host, record.port)
        tune(transport)
        return transport


def tune(transport: asyncio.BaseTransport) -> None:
    """Turns Nagle's algorithm off: a step frame must never wait for the acknowledgement of the one before."""
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
