"""The seam between the gRPC service and the edges that carry its calls.

An edge gives each call to a `Handler`, in a task of its own. Rule: a handler that returns has ended its call with OK;
one that failed has told so by `Call.fail`; when the client is gone the edge cancels the task.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol, TypeAlias

import grpc

from router.ingress.grpc_errors import Trailers
from router.ingress.grpc_sink import StreamSink


class Call(Protocol):
    """One call from a client."""

    def metadata(self) -> Mapping[str, str]:
        """The request's text metadata; names are lower case."""

    def time_remaining(self) -> float | None:
        """Seconds until the call's deadline; None where it has none."""

    def peer(self) -> str:
        """Who calls, for logs. Only while the handler runs."""

    async def read(self) -> bytes | None:
        """The next request message; None where the client sent its last. Raises `KvlaneError` for a broken one."""

    def stream(self, request_id: str) -> StreamSink:
        """The way of a streamed answer to the client; its owner closes it."""

    async def answer(self, message: bytes, request_id: str = "") -> None:
        """Sends the one message of a unary call; with a request id also the metadata that tells it."""

    async def fail(self, code: grpc.StatusCode, message: str, trailers: Trailers) -> None:
        """Ends the call with a status, behind what was sent. May return before the client has read up to it."""


Handler: TypeAlias = Callable[[Call], Awaitable[None]]


class Edge(Protocol):
    """A gRPC server."""

    @property
    def abandoned(self) -> bool:
        """A call was ended whose client has not read its status; only the client or a stop ends that call's stream."""

    @property
    def connections(self) -> int | None:
        """Connections open now, where that is known."""

    async def start(self) -> int:
        """Listens; returns the port. Raises `ConfigError`."""

    async def listen(self, socks: Sequence[socket.socket]) -> None:
        """Accepts connections on these sockets and on no others; they stay their owner's.

        Other processes may accept on them too: what waits there when this one ceases is theirs, and is not reset.
        """

    def notice(self, limit_s: float) -> None:
        """It stops after that time: asks clients to make their next calls elsewhere, and serves whoever comes."""

    async def last_call(self) -> None:
        """Accepts nothing more, asks clients to make their next calls elsewhere, and returns when all have gone."""

    async def stop(self, grace_s: float) -> None:
        """Refuses new calls at once; returns when all are over and their clients have everything, or ends them after
        `grace_s` seconds. Called again while it runs, it shortens the grace."""
