"""Runs grpc's own servicers (health, reflection) as handlers of the `h2` edge.

They get what they use of a `grpc.aio.ServicerContext`: `write` and `abort`. Rule: what a servicer sends waits until the
client has taken what came before.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator
from typing import Any, NoReturn

import grpc

from router.errors import ClientTooSlow, KvlaneError
from router.ingress.grpc_call import Handler
from router.ingress.grpc_errors import render
from router.ingress.h2_call import H2Call


class _Aborted(Exception):
    """The servicer ended the call by a status."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code = code
        self.details = details


class _Context:
    def __init__(self, call: H2Call, method: grpc.RpcMethodHandler[Any, Any], limit_s: float) -> None:
        self._call = call
        self._method = method
        self._limit_s = limit_s

    async def write(self, message: Any) -> None:
        serialize = self._method.response_serializer
        assert serialize is not None
        self._call.send(serialize(message))
        if not await self._call.output.flushed(self._limit_s):
            raise ClientTooSlow(f"the client read nothing for {self._limit_s:g} s")

    async def abort(self, code: grpc.StatusCode, details: str = "") -> NoReturn:
        raise _Aborted(code, details)

    async def requests(self) -> AsyncIterator[Any]:
        deserialize = self._method.request_deserializer
        assert deserialize is not None
        while (message := await self._call.read()) is not None:
            yield deserialize(message)


def served(method: grpc.RpcMethodHandler[Any, Any], limit_s: float) -> Handler:
    """The handler that runs this method; a client that reads nothing for `limit_s` is given up."""

    async def handler(call: Any) -> None:
        context = _Context(call, method, limit_s)
        try:
            await _run(call, method, context)
        except _Aborted as end:
            await call.fail(end.code, end.details, ())
        except KvlaneError as error:
            await call.fail(*render(error))

    return handler


async def _run(call: H2Call, method: grpc.RpcMethodHandler[Any, Any], context: _Context) -> None:
    run = method.unary_unary or method.unary_stream or method.stream_stream
    assert run is not None
    asked: Any = context.requests()
    if not method.request_streaming:
        asked = await anext(asked, None)
        call.stop_reading()
        if asked is None:
            raise _Aborted(grpc.StatusCode.INVALID_ARGUMENT, "the call brought no request message")
    answer: Any = run(asked, context)  # type: ignore[arg-type]
    if inspect.isasyncgen(answer):
        async for message in answer:
            await context.write(message)
    elif (message := await answer) is not None:
        await context.write(message)
