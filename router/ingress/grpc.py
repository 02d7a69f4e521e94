"""The gRPC ingress: the service `kvlane.v1.Inference` on a grpc.aio server, with health and reflection.

Handlers take and give raw bytes: a request is parsed once to route it and travels on as it came; a response is written
as the replica made it. Rule: a call ends in exactly one of an answer, a status made by `grpc_errors.render`, or its
client's own cancel. The ingress owns the server and every call's writer task.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeAlias, cast

import grpc
import grpc.aio
import msgspec
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from kvlane.v1 import inference_pb2 as pb

from router.errors import (
    LOGGED_CHARS,
    ClientTooSlow,
    DeadlineExceeded,
    Fault,
    InternalError,
    InvalidRequest,
    KvlaneError,
    RequestTimeout,
    ShuttingDown,
    cut,
)
from router.ingress import request_ids
from router.ingress.base import Dispatch, Fleet
from router.ingress.grpc_errors import render
from router.ingress.grpc_port import bind, server_options
from router.ingress.grpc_requests import (
    SERVICE,
    Caller,
    caller_of,
    chat_request,
    embed_request,
    generate_request,
    models_request,
)
from router.ingress.grpc_sink import Context, StreamSink, UnarySink, request_id_metadata
from router.options import GrpcOptions
from router.types import Request

log = logging.getLogger(__name__)

FLUSH_S: Final = 0.5
"""At the end of `stop`: time for final statuses to leave before connections are cut."""
STATUS_S: Final = 5.0
"""How long a failed call's handler stays until its client has read up to the status. grpc sends a status only behind
all messages, and only a client can end a call early, so one that does not read is then left to grpc: it gets the rest
and the status whenever it reads on."""

Parse: TypeAlias = Callable[[bytes, Caller, Callable[[], str]], Request]
Handler: TypeAlias = Callable[["_Call"], Awaitable[bytes | None]]


class GrpcIngress:
    """Serves gRPC until stopped. Start it only after any fork: gRPC's threads do not survive one."""

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
        self._dispatch = dispatch
        self._fleet = fleet
        self._reuse_port = reuse_port
        self._new_id = new_id
        self._refused = refused
        self._health = _Health()
        self._server: grpc.aio.Server | None = None
        self._calls: set[asyncio.Task[object]] = set()
        self._reading: set[asyncio.Task[object]] = set()
        self._cut: set[asyncio.Task[object]] = set()
        self._abandoned = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def start(self) -> int:
        """Listens; returns the port bound. Raises `ConfigError` where address or TLS files cannot be used."""
        await self.set_ready(False)
        server = grpc.aio.server(options=server_options(self._options, reuse_port=self._reuse_port))
        server.add_generic_rpc_handlers((self._handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self._options.reflection:
            names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)
        port = bind(server, self._options)
        await server.start()
        self._server = server
        return port

    async def set_ready(self, ready: bool) -> None:
        """What the standard health service answers for the server and for `Inference`."""
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", SERVICE):
            await self._health.set(service, status)

    async def stop(self, grace_s: float) -> None:
        """Takes no new calls and gives those in flight `grace_s` seconds; what is left then ends with UNAVAILABLE.

        Calls that have not sent their request yet end so at once.
        """
        server, self._server = self._server, None
        if server is None:
            return
        await self._health.enter_graceful_shutdown()
        # Refuses new calls at once, and returns when all calls are over and their clients have everything.
        draining = asyncio.create_task(server.stop(grace_s + FLUSH_S))
        try:
            self._cut_off(self._reading)
            in_time = await self._idle_within(grace_s)
            self._health.end_watches()
            if not in_time:
                self._cut_off(self._calls)
            elif self._abandoned:
                await server.stop(FLUSH_S)  # Its client may never read what would let the call end.
        finally:
            await draining
            if self._calls:  # The server is done with them, and they end in the loop's next rounds.
                await asyncio.wait(tuple(self._calls), timeout=FLUSH_S)

    def _cut_off(self, calls: set[asyncio.Task[object]]) -> None:
        for call in calls - self._cut:
            self._cut.add(call)
            call.cancel()

    async def _idle_within(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def _handlers(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Generate": self._streaming("Generate", self._streamed(generate_request)),
                "Chat": self._streaming("Chat", self._streamed(chat_request)),
                "Embed": self._unary("Embed", self._embed),
                "Models": self._unary("Models", self._models),
            },
        )

    # The handlers read their one request themselves (as if requests were streams): grpc.aio's own reading leaves a call
    # that sends none without any answer. No serializers: bytes in, bytes out.
    def _streaming(self, method: str, handler: Handler) -> grpc.RpcMethodHandler[bytes, bytes]:
        return grpc.stream_stream_rpc_method_handler(self._guarded(method, handler))

    def _unary(self, method: str, handler: Handler) -> grpc.RpcMethodHandler[bytes, bytes]:
        return grpc.stream_unary_rpc_method_handler(self._guarded(method, handler))

    def _guarded(self, method: str, handler: Handler) -> Callable[[object, Context], Awaitable[bytes | None]]:
        """The one place where a call's failure becomes its status."""

        async def guarded(_requests: object, context: Context) -> bytes | None:
            task = _current_task()
            self._enter(task)
            call = _Call(method, context)
            try:
                return await self._answered(call, handler)
            except grpc.aio.InternalError as error:
                # The status found no client any more; grpc's own cancel of this task may come later.
                raise asyncio.CancelledError from error
            finally:
                self._leave(task)

        return guarded

    async def _answered(self, call: _Call, handler: Handler) -> bytes | None:
        try:
            return await self._uncut(handler(call))
        except KvlaneError as error:
            failure = error
            _log_failure(call, error)
            if not call.dispatched:
                self._refused("grpc", error.name)
        except grpc.aio.InternalError:
            raise
        except Exception:
            log.exception("%s: a defect in the gRPC ingress or behind it", call.described())
            failure = InternalError("internal error")
            if not call.dispatched:
                self._refused("grpc", failure.name)
        code, message, trailers = render(failure, call.request_id)
        try:
            async with asyncio.timeout(STATUS_S):
                return await call.context.abort(code, message, trailers)
        except TimeoutError as error:
            self._abandoned = True
            raise asyncio.CancelledError from error

    async def _uncut(self, work: Awaitable[bytes | None]) -> bytes | None:
        """The result of `work`. Raises `ShuttingDown` where `stop` cut this call off."""
        try:
            return await work
        except asyncio.CancelledError:
            task = _current_task()
            if task not in self._cut:
                raise
            task.uncancel()
            raise ShuttingDown("this router is going away") from None

    def _enter(self, task: asyncio.Task[object]) -> None:
        self._calls.add(task)
        self._idle.clear()

    def _leave(self, task: asyncio.Task[object]) -> None:
        self._calls.discard(task)
        self._cut.discard(task)
        if not self._calls:
            self._idle.set()

    def _streamed(self, parse: Parse) -> Handler:
        async def streamed(call: _Call) -> None:
            request = await self._request(call, parse)
            sink = StreamSink(request.request_id, self._options.stream_buffer_bytes)
            writer = asyncio.create_task(sink.pump(call.context))
            try:
                await self._dispatch.run(request, sink)
                sink.complete()
                await self._flushed(sink, writer)
            except ClientTooSlow:
                raise
            except Exception as error:
                # What came before the failure is the client's; the status goes out behind it.
                sink.stop()
                await self._flushed(sink, writer, error)
                raise
            finally:
                if not writer.done():
                    sink.drop()
                    if sink.opening:
                        await asyncio.wait([writer], timeout=STATUS_S)
                    writer.cancel()
                    await asyncio.wait([writer])

        return streamed

    async def _flushed(self, sink: StreamSink, writer: asyncio.Task[None], failure: Exception | None = None) -> None:
        """Waits until the client has taken all of an ended stream.

        Raises `failure`, by default `ClientTooSlow`, where it takes nothing for `read_timeout_s`.
        """
        limit_s = self._options.read_timeout_s
        while not writer.done():
            before = sink.unread_bytes
            await asyncio.wait([writer], timeout=limit_s)
            if not writer.done() and sink.unread_bytes == before:
                raise failure or ClientTooSlow(f"the client left {before} bytes unread for {limit_s:g} s")
        await writer

    async def _request(self, call: _Call, parse: Parse) -> Request:
        """The request to route. Raises `InvalidRequest`, `RequestTimeout`, and `DeadlineExceeded` without time left."""
        metadata = _text_metadata(call.context)
        call.request_id = request_ids.accepted(metadata.get("x-request-id")) or self._new_id()
        body = await self._body(call)
        # Stubs say that there always is a deadline; a call without one has None.
        timeout_s = cast("float | None", call.context.time_remaining())
        request = parse(body, caller_of(metadata, timeout_s), lambda: call.request_id)
        if not request.lora and self._fleet.parent(request.model):  # An adapter asked for by its own name.
            request = msgspec.structs.replace(request, lora=request.model)
        call.request_id = request.request_id
        if timeout_s is not None and timeout_s <= 0:
            raise DeadlineExceeded("the deadline passed before the request was read")
        call.dispatched = True
        return request

    async def _body(self, call: _Call) -> bytes:
        """The serialized request. Raises `InvalidRequest` where the client sent none, and `RequestTimeout`."""
        limit_s = self._options.request_timeout_s
        task = _current_task()
        self._reading.add(task)
        try:
            async with asyncio.timeout(limit_s):
                body = await call.context.read()
        except TimeoutError as error:
            raise RequestTimeout(f"the call brought no whole request message within {limit_s:g} s") from error
        finally:
            self._reading.discard(task)
        if not isinstance(body, bytes):
            raise InvalidRequest("the call brought no request message, or one over the limit")
        return body

    async def _embed(self, call: _Call) -> bytes:
        request = await self._request(call, embed_request)
        sink = UnarySink()
        await self._dispatch.run(request, sink)
        answer = sink.answer()
        await call.context.send_initial_metadata(request_id_metadata(request.request_id))
        return answer

    async def _models(self, call: _Call) -> bytes:
        models_request(await self._body(call))
        models = [
            pb.Model(
                name=status.card.name,
                parent=status.card.parent,
                max_model_len=status.card.max_model_len,
                ready_replicas=status.ready_replicas,
            )
            for status in self._fleet.models()
        ]
        return pb.ModelsResponse(models=models).SerializeToString()


class _Health(health.aio.HealthServicer):
    """The standard health service; its watches, which never end by themselves, can be ended."""

    def __init__(self) -> None:
        super().__init__()
        self._watches: set[asyncio.Task[object]] = set()
        self._ending = False

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        task = _current_task()
        self._watches.add(task)
        try:
            await super().Watch(request, context)
        except asyncio.CancelledError:
            if not self._ending:
                raise
            # Without a status the call would stay open: grpc ends none whose handler was merely cancelled.
            task.uncancel()
            await context.abort(grpc.StatusCode.UNAVAILABLE, "this router is going away")
        finally:
            self._watches.discard(task)

    def end_watches(self) -> None:
        """Ends them all, so that they do not hold a stop up."""
        self._ending = True
        for watch in self._watches:
            watch.cancel()


class _Call:
    """One call: its context, and who it is in the logs."""

    def __init__(self, method: str, context: Context) -> None:
        self.method = method
        self.context = context
        self.request_id = ""
        self.dispatched = False
        """Dispatch has it, and counts how it ends."""

    def described(self) -> str:
        """For logs. Only while the handler runs: grpc frees the call after it, and `peer` would then crash the process,
        so never hand the call itself to a logger, which may format it later."""
        return f"{self.method} {self.request_id or '-'} from {self.context.peer()}"


def _text_metadata(context: Context) -> dict[str, str]:
    pairs = cast("tuple[tuple[str, str | bytes], ...]", context.invocation_metadata() or ())
    return {key: value for key, value in pairs if isinstance(value, str)}


def _log_failure(call: _Call, error: KvlaneError) -> None:
    level = logging.INFO if error.fault is Fault.CLIENT else logging.WARNING
    log.log(level, "%s: %s: %r", call.described(), error.name, cut(error.message, LOGGED_CHARS))


def _current_task() -> asyncio.Task[object]:
    task = asyncio.current_task()
    assert task is not None, "grpc runs each handler in a task"
    return task
