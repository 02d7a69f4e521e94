"""The gRPC edge on grpc.aio: its server, its calls, and the sink that writes through a task of each stream's own.

Writing with `context.write` from a task costs what an async generator's `yield` does (measured on grpcio 1.85: 30 to
40 µs of CPU per message under uvloop, 42 to 48 under asyncio's own loop), and leaves the handler free to await.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias, cast

import grpc
import grpc.aio

from router.ingress.grpc_call import Handler
from router.ingress.grpc_errors import Trailers
from router.ingress.grpc_health import Methods
from router.ingress.grpc_port import bind, server_options, tls_context
from router.ingress.grpc_sink import StreamSink, check_room, route_message
from router.options import GrpcOptions

STATUS_S: Final = 5.0
"""How long a failed call's handler stays until its client has read up to the status. grpc sends a status only behind
all messages, and only a client can end a call early, so one that does not read is then left to grpc: it gets the rest
and the status whenever it reads on."""

LAST_CALL_S: Final = 24 * 3600.0
"""Longer than anybody waits for the last call's end; `stop` shortens it."""

Context: TypeAlias = grpc.aio.ServicerContext[bytes, bytes]


class AioEdge:
    """A grpc.aio server. Start it only after any fork: gRPC's threads do not survive one."""

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
        self.abandoned = False
        self._options = options
        self._reuse_port = reuse_port
        # The handlers read their one request themselves (as if requests were streams): grpc.aio's own reading leaves a
        # call that sends none without any answer. No serializers: bytes in, bytes out.
        own: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            name: grpc.stream_stream_rpc_method_handler(self._run(handler)) for name, handler in handlers.items()
        }
        self._services = {service: own, **standard}
        self._server: grpc.aio.Server | None = None

    async def start(self) -> int:
        """Listens; returns the port bound. Raises `ConfigError` where address or TLS files cannot be used."""
        server = grpc.aio.server(options=server_options(self._options, reuse_port=self._reuse_port))
        for name, methods in self._services.items():
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, methods),))
        port = bind(server, self._options)
        await server.start()
        self._server = server
        return port

    async def listen(self, socks: Sequence[socket.socket]) -> None:
        """grpc's server takes no sockets: it binds its own beside these when first told to, and keeps it.

        What waits to be accepted there when it ends is reset.
        """
        tls_context(self._options)  # What cannot be used is refused at once, as by the other edge.
        if socks and self._server is None:
            await self.start()

    def notice(self, limit_s: float) -> None:
        """grpc's server can ask clients to leave only by its stop, which refuses their next calls."""

    @property
    def connections(self) -> None:
        """grpc does not tell."""

    async def last_call(self) -> None:
        """As `Edge.last_call`."""
        if self._server is not None:
            await self._server.stop(LAST_CALL_S)

    async def stop(self, grace_s: float) -> None:
        """As `Edge.stop`."""
        if self._server is not None:
            await self._server.stop(grace_s)

    def _run(self, handler: Handler) -> Callable[[object, Context], Awaitable[None]]:
        async def run(_requests: object, context: Context) -> None:
            try:
                await handler(AioCall(context, self))
            except grpc.aio.InternalError as error:
                # What was sent found no client any more; grpc's own cancel of this task may come later.
                raise asyncio.CancelledError from error

        return run

    @property
    def buffer_bytes(self) -> int:
        return self._options.stream_buffer_bytes


class AioCall:
    """One call (see `grpc_call.Call`)."""

    def __init__(self, context: Context, edge: AioEdge) -> None:
        self._context = context
        self._edge = edge

    def metadata(self) -> dict[str, str]:
        pairs = cast("tuple[tuple[str, str | bytes], ...]", self._context.invocation_metadata() or ())
        return {key: value for key, value in pairs if isinstance(value, str)}

    def time_remaining(self) -> float | None:
        # Stubs say that there always is a deadline; a call without one has None.
        return cast("float | None", self._context.time_remaining())

    def peer(self) -> str:
        """grpc frees the call after its handler, and would then crash the process: never hand the call itself to a
        logger, which may format it later."""
        return self._context.peer()

    async def read(self) -> bytes | None:
        message = await self._context.read()
        return message if isinstance(message, bytes) else None  # Else it is grpc's own mark of the end.

    def stream(self, request_id: str) -> AioSink:
        return AioSink(self._context, request_id, self._edge.buffer_bytes)

    async def answer(self, message: bytes, request_id: str = "") -> None:
        if request_id:
            await self._context.send_initial_metadata((("x-request-id", request_id),))
        await self._context.write(message)

    async def fail(self, code: grpc.StatusCode, message: str, trailers: Trailers) -> None:
        try:
            async with asyncio.timeout(STATUS_S):
                await self._context.abort(code, message, trailers)
        except TimeoutError as error:
            self._edge.abandoned = True
            raise asyncio.CancelledError from error


class AioSink(StreamSink):
    """Holds what a client has not taken yet, up to a bound; its `pump`, a task of its own, writes it out."""

    __slots__ = (
        *("_buffer_bytes", "_context", "_dropped", "_finished", "_messages", "_opening", "_ready", "_request_id"),
        *("_unread_bytes", "_writer"),
    )

    def __init__(self, context: Context, request_id: str, buffer_bytes: int) -> None:
        super().__init__()
        self._context = context
        self._request_id = request_id
        self._buffer_bytes = buffer_bytes
        self._messages: deque[bytes] = deque()
        self._unread_bytes = 0
        """Bytes taken and not yet written, the message being written included."""
        self._ready = asyncio.Event()
        self._finished = False
        self._dropped = False
        self._opening = False
        """The initial metadata is being sent. Cancelling `pump` then would leave the call without any status: grpc.aio
        would send the metadata anew with it, which its core refuses."""
        self._writer = asyncio.create_task(self.pump())

    def data(self, payload: bytes, tokens: int) -> None:
        check_room(self._unread_bytes, self._buffer_bytes)
        self.started = True
        self._messages.append(payload)
        self._unread_bytes += len(payload)
        self._ready.set()

    @property
    def unread_bytes(self) -> int:
        return self._unread_bytes

    def complete(self) -> None:
        self.started = True
        self.stop()

    def stop(self) -> None:
        self._finished = True
        self._ready.set()

    async def flushed(self, limit_s: float) -> bool:
        await asyncio.wait([self._writer], timeout=limit_s)
        if not self._writer.done():
            return False
        await self._writer
        return True

    async def close(self) -> None:
        writer = self._writer
        if writer.done():
            return
        self._dropped = True
        self._messages.clear()
        self.stop()
        if self._opening:
            await asyncio.wait([writer], timeout=STATUS_S)
        writer.cancel()
        await asyncio.wait([writer])

    async def pump(self) -> None:
        """Writes the stream until its end. Ends as cancelled where the client is gone."""
        try:
            await self._write_all()
        except grpc.aio.InternalError as error:
            # A write fails because the client is gone; grpc's own cancel of the handler comes a moment sooner or later.
            raise asyncio.CancelledError from error

    async def _write_all(self) -> None:
        await self._ready.wait()
        if not self.started or self._dropped:
            return
        self._opening = True
        await self._context.send_initial_metadata((("x-request-id", self._request_id),))
        self._opening = False
        if self._dropped:
            return
        if self._receipt is not None:
            await self._context.write(route_message(self._receipt))
        while True:
            await self._write_waiting()
            if self._finished:
                return
            self._ready.clear()
            await self._ready.wait()

    async def _write_waiting(self) -> None:
        while self._messages:
            payload = self._messages.popleft()
            await self._context.write(payload)
            self._unread_bytes -= len(payload)
