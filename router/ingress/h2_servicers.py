"""Runs servicers of grpc's kind (health, reflection) as handlers of the `h2` edge.

They get what they use of a `grpc.aio.ServicerContext`: `write` and `abort`. Rule: what a servicer sends waits until the
client has taken what came before.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from router.errors import ClientTooSlow, InvalidRequest, KvlaneError, RequestTimeout
from router.ingress.grpc_call import Handler
from router.ingress.grpc_errors import render
from router.ingress.h2_call import H2Call
from router.options import GrpcOptions


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
        while (message := await self._read()) is not None:
            yield message

    async def _read(self) -> Any:
        deserialize = self._method.request_deserializer
        assert deserialize is not None
        message = await self._call.read()
        try:
            return None if message is None else deserialize(message)
        except DecodeError as error:
            raise InvalidRequest("the request is no valid message of this method") from error

    async def request(self, limit_s: float) -> Any:
        """The one of a method that takes one."""
        try:
            async with asyncio.timeout(limit_s):
                asked = await self._read()
        except TimeoutError as error:
            raise RequestTimeout(f"the call brought no whole request message within {limit_s:g} s") from error
        if asked is None:
            raise InvalidRequest("the call brought no request message")
        return asked


def served(method: grpc.RpcMethodHandler[Any, Any], options: GrpcOptions) -> Handler:
    """The handler that runs this method; a client that reads nothing for `read_timeout_s` is given up."""

    async def handler(call: Any) -> None:
        context = _Context(call, method, options.read_timeout_s)
        try:
            await _run(call, method, context, options.request_timeout_s)
        except _Aborted as end:
            await call.fail(end.code, end.details, ())
        except KvlaneError as error:
            await call.fail(*render(error))

    return handler


async def _run(
    call: H2Call, method: grpc.RpcMethodHandler[Any, Any], context: _Context, request_timeout_s: float
) -> None:
    run = method.unary_unary or method.unary_stream or method.stream_stream
    assert run is not None
    asked: Any = context.requests() if method.request_streaming else await context.request(request_timeout_s)
    if not method.request_streaming:
        call.stop_reading()
    answer: Any = run(asked, context)  # type: ignore[arg-type]
    if (message := await answer) is not None:
        await context.write(message)
