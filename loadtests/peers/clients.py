"""The client of a system that speaks HTTP/1.1: keep-alive connections. For gRPC see `loadtests.peers.grpc_client`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from loadtests.peers.answers import read_http
from loadtests.peers.load import Caller, HttpCaller
from loadtests.processes import MODEL


class HttpClient:
    """Connections shared out over `ports`."""

    read = staticmethod(read_http)

    def __init__(self, ports: Sequence[int], model: str = MODEL) -> None:
        self._ports = ports
        self._model = model

    @asynccontextmanager
    async def callers(self, streams: int) -> AsyncIterator[list[Caller]]:
        made = [HttpCaller(self._ports[number % len(self._ports)], self._model) for number in range(streams)]
        try:
            yield list(made)
        finally:
            for caller in made:
                caller.close()
