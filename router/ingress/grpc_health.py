"""The standard services beside our own: health, and reflection for tools that have no .proto files.

Rule: what never ends by itself can be ended, so that nothing holds a stop up.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any, Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from router.ingress.grpc_requests import SERVICE

TELL_S: Final = 0.3
"""How long the end of a call waits for its client to take what is being sent: less than a stop waits for such calls."""
REFLECTION_V1: Final = "grpc.reflection.v1.ServerReflection"
"""Its messages are those of v1alpha under another package name, which is not on the wire."""

Methods = dict[str, "grpc.RpcMethodHandler[Any, Any]"]


class Standing:
    """Calls that last as long as their clients want; they can be ended."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[object]] = set()
        self._telling: set[asyncio.Task[object]] = set()
        self.ending = False

    @asynccontextmanager
    async def ended_by(self, context: Any) -> AsyncIterator[None]:
        """Ends with UNAVAILABLE where this call is among those that are ended."""
        task = _handler()
        self._tasks.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if not self.ending:
                raise
            # Without a status the call would stay open: grpc ends none whose handler was merely cancelled.
            task.uncancel()
            await context.abort(grpc.StatusCode.UNAVAILABLE, "this router is going away")
        finally:
            self._tasks.discard(task)

    @asynccontextmanager
    async def telling(self) -> AsyncIterator[None]:
        """What is sent within arrives whole: an end waits for it, for a while. Who sends looks at `ending` after it.

        grpc's server drops a message whose write is cancelled, and sends the status alone.
        """
        task = _handler()
        self._telling.add(task)
        try:
            yield
        finally:
            self._telling.discard(task)

    def end(self) -> None:
        """Ends them all, so that they do not hold a stop up."""
        self.ending = True
        for task in self._tasks - self._telling:
            task.cancel()
        if self._telling:
            asyncio.get_running_loop().call_later(TELL_S, self._cut_off, frozenset(self._telling))

    def _cut_off(self, tasks: frozenset[asyncio.Task[object]]) -> None:
        for task in tasks & self._telling:
            task.cancel()


def _handler() -> asyncio.Task[object]:
    task = asyncio.current_task()
    assert task is not None, "an edge runs each handler in a task"
    return task


class Health(health_pb2_grpc.HealthServicer):
    """The standard health service. No watch waits for another one's client (grpc's own servicer holds a lock while it
    writes, so that one client that does not read would keep readiness from all)."""

    def __init__(self) -> None:
        self.standing = Standing()
        self._status: Any = health_pb2.HealthCheckResponse.NOT_SERVING
        self._changed = asyncio.Event()
        self._leaving = False

    def set_ready(self, ready: bool) -> None:
        """What it answers for the server and for `Inference`."""
        if not self._leaving:
            answer = health_pb2.HealthCheckResponse
            self._set(answer.SERVING if ready else answer.NOT_SERVING)

    def leave(self) -> None:
        """It is not ready, and never will be again."""
        self._leaving = True
        self._set(health_pb2.HealthCheckResponse.NOT_SERVING)

    def _set(self, status: Any) -> None:
        self._status = status
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> Any:
        if request.service not in ("", SERVICE):
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no such service")
        return health_pb2.HealthCheckResponse(status=self._status)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        known, last = request.service in ("", SERVICE), None
        async with self.standing.ended_by(context):
            while True:
                changed = self._changed
                status = self._status if known else health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
                if status != last:
                    last = status
                    async with self.standing.telling():
                        await context.write(health_pb2.HealthCheckResponse(status=status))
                elif self.standing.ending:
                    raise asyncio.CancelledError
                else:
                    await changed.wait()


def standard_services(servicer: Health, *, with_reflection: bool) -> dict[str, Methods]:
    """The handlers of each standard service, by method name."""
    services: dict[str, Methods] = {health.SERVICE_NAME: _health(servicer)}
    if with_reflection:
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME, REFLECTION_V1)
        services[reflection.SERVICE_NAME] = services[REFLECTION_V1] = _reflection(names, servicer.standing)
    return services


def _health(servicer: Health) -> Methods:
    asked, answered = health_pb2.HealthCheckRequest.FromString, health_pb2.HealthCheckResponse.SerializeToString
    return {
        "Check": grpc.unary_unary_rpc_method_handler(servicer.Check, asked, answered),
        "Watch": grpc.unary_stream_rpc_method_handler(servicer.Watch, asked, answered),
    }


def _reflection(names: tuple[str, ...], standing: Standing) -> Methods:
    servicer: Any = reflection.aio.ReflectionServicer(names)

    async def info(requests: Any, context: Any) -> None:
        async with standing.ended_by(context), aclosing(servicer.ServerReflectionInfo(requests, context)) as answers:
            async for answer in answers:
                await context.write(answer)

    return {
        "ServerReflectionInfo": grpc.stream_stream_rpc_method_handler(
            info,
            reflection_pb2.ServerReflectionRequest.FromString,
            reflection_pb2.ServerReflectionResponse.SerializeToString,
        )
    }
