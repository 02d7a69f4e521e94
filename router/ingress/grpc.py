"""The gRPC ingress: the service `kvlane.v1.Inference` on one of two edges, with health and reflection.

`grpc.edge` says which edge: `h2` is our own on the h2 package (see docs/decisions), `aio` is grpc's server. Rule: what
a client is told is decided in `grpc_service`, whichever edge carries it. The ingress owns the edge.
"""

from __future__ import annotations

import asyncio
import socket
import uuid
from collections.abc import Callable, Sequence
from typing import Final

from router.ingress.base import Dispatch, Fleet
from router.ingress.grpc_call import Edge
from router.ingress.grpc_health import Health, standard_services
from router.ingress.grpc_requests import SERVICE
from router.ingress.grpc_service import InferenceService
from router.options import GrpcOptions

WATCH_S: Final = 1.0
"""How often calls that last (watches, reflection), which hold their connections open, are ended in a last call."""
FLUSH_S: Final = 0.5
"""At the end of `stop`: time for final statuses to leave before connections are cut."""


class GrpcIngress:
    """Serves gRPC until stopped."""

    def __init__(
        self,
        options: GrpcOptions,
        dispatch: Dispatch,
        fleet: Fleet,
        *,
        reuse_port: bool = False,
        new_id: Callable[[], str] = lambda: uuid.uuid4().hex,
        refused: Callable[[str, str], None] = lambda rpc, error: None,
    ) -> None:
        """`refused` is called with ``"grpc"`` and the error's name for each error answered without dispatch."""
        self._options = options
        self._reuse_port = reuse_port
        self._health = Health()
        self._service = InferenceService(options, dispatch, fleet, new_id, refused)
        self._edge: Edge | None = None
        self._stopping = False

    @property
    def connections(self) -> int | None:
        """Connections open now; None where the edge does not know."""
        return self._edge.connections if self._edge is not None else 0

    async def start(self) -> int:
        """Listens; returns the port bound. Raises `ConfigError` where address or TLS files cannot be used."""
        return await (await self._begun()).start()

    async def listen(self, socks: Sequence[socket.socket]) -> None:
        """Listens on these sockets, which other processes may share, and on no others. Raises `ConfigError`."""
        await (await self._begun()).listen(socks)

    def notice(self, limit_s: float) -> None:
        """It stops after that time: unready, it serves on, and clients are asked to make their next calls elsewhere."""
        self._health.leave()
        if self._edge is not None:
            self._edge.notice(limit_s)

    async def last_call(self) -> None:
        """Accepts nothing more, asks clients to make their next calls elsewhere, and returns when all have gone."""
        if self._edge is None:
            return
        ending = asyncio.create_task(self._edge.last_call())
        await asyncio.sleep(0)  # So that clients are told before their watches end.
        try:
            while not ending.done():
                self._health.standing.end()
                await asyncio.wait([ending], timeout=WATCH_S)
        finally:
            ending.cancel()
            await asyncio.gather(ending, return_exceptions=True)

    async def _begun(self) -> Edge:
        if self._edge is None:
            self._edge = self._made()
        return self._edge

    def _made(self) -> Edge:
        handlers = self._service.handlers()
        standard = standard_services(self._health, with_reflection=self._options.reflection)
        if self._options.edge == "aio":
            from router.ingress.grpc_aio import AioEdge

            return AioEdge(self._options, SERVICE, handlers, standard, reuse_port=self._reuse_port)
        from router.ingress.h2_edge import H2Edge

        return H2Edge(self._options, SERVICE, handlers, standard, reuse_port=self._reuse_port)

    async def set_ready(self, ready: bool) -> None:
        """What the standard health service answers for the server and for `Inference`."""
        self._health.set_ready(ready)

    async def stop(self, grace_s: float) -> None:
        """Takes no new calls and gives those in flight `grace_s` seconds; what is left then ends with UNAVAILABLE.

        Calls that have not sent their request yet end so at once. Called again while it runs, it ends all calls.
        """
        edge, service = self._edge, self._service
        if edge is None:
            return
        if self._stopping:
            self._health.standing.end()
            service.cut_off(service.calls)
            await edge.stop(FLUSH_S)
            return
        self._stopping = True
        try:
            await self._stop(edge, grace_s)
        finally:
            self._edge, self._stopping = None, False

    async def _stop(self, edge: Edge, grace_s: float) -> None:
        service = self._service
        self._health.leave()
        draining = asyncio.create_task(edge.stop(grace_s + FLUSH_S))
        await asyncio.sleep(0)  # So that it has begun.
        try:
            service.cut_off(service.reading)
            in_time = await service.idle_within(grace_s)
            self._health.standing.end()
            if not in_time:
                service.cut_off(service.calls)
            else:
                await asyncio.wait([draining], timeout=FLUSH_S)
                if edge.abandoned:
                    await edge.stop(FLUSH_S)  # Its client may never read what would let the call end.
        finally:
            await draining
            if service.calls:  # The edge is done with them, and they end in the loop's next rounds.
                await asyncio.wait(tuple(service.calls), timeout=FLUSH_S)
