"""The standard services beside our own: health, and reflection for tools that have no .proto files.

Both are grpc's own servicers. Rule: what never ends by itself can be ended, so that nothing holds a stop up.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import grpc
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from router.ingress.grpc_requests import SERVICE

REFLECTION_V1: Final = "grpc.reflection.v1.ServerReflection"
"""Its messages are those of v1alpha under another package name, which is not on the wire."""

Methods = dict[str, "grpc.RpcMethodHandler[Any, Any]"]


class Health(health.aio.HealthServicer):
    """The standard health service; its watches, which never end by themselves, can be ended."""

    def __init__(self) -> None:
        super().__init__()
        self._watches: set[asyncio.Task[object]] = set()
        self._ending = False

    async def set_ready(self, ready: bool) -> None:
        """What it answers for the server and for `Inference`."""
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", SERVICE):
            await self.set(service, status)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        task = asyncio.current_task()
        assert task is not None, "an edge runs each handler in a task"
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


def standard_services(servicer: Health, *, with_reflection: bool) -> dict[str, Methods]:
    """The handlers of each standard service, by method name."""
    services: dict[str, Methods] = {health.SERVICE_NAME: _health(servicer)}
    if with_reflection:
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME, REFLECTION_V1)
        services[reflection.SERVICE_NAME] = services[REFLECTION_V1] = _reflection(names)
    return services


def _health(servicer: Health) -> Methods:
    asked, answered = health_pb2.HealthCheckRequest.FromString, health_pb2.HealthCheckResponse.SerializeToString
    return {
        "Check": grpc.unary_unary_rpc_method_handler(servicer.Check, asked, answered),
        "Watch": grpc.unary_stream_rpc_method_handler(servicer.Watch, asked, answered),
    }


def _reflection(names: tuple[str, ...]) -> Methods:
    servicer = reflection.aio.ReflectionServicer(names)
    return {
        "ServerReflectionInfo": grpc.stream_stream_rpc_method_handler(
            servicer.ServerReflectionInfo,
            reflection_pb2.ServerReflectionRequest.FromString,
            reflection_pb2.ServerReflectionResponse.SerializeToString,
        )
    }
