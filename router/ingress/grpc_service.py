"""The service `kvlane.v1.Inference`, whichever edge carries its calls.

Handlers take and give raw bytes: a request is parsed once to route it and travels on as it came; a response is sent as
the replica made it. Rule: a call ends in exactly one of an answer, a status made by `grpc_errors.render`, or its
client's own cancel. The service knows every call in flight, and can cut them off.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeAlias

import msgspec
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
from router.ingress import grpc_large, request_ids
from router.ingress.base import Dispatch, Fleet
from router.ingress.gate import Gate, visible
from router.ingress.grpc_call import Call, Handler
from router.ingress.grpc_errors import render
from router.ingress.grpc_requests import (
    Caller,
    caller_of,
    chat_request,
    embed_request,
    generate_request,
    models_request,
)
from router.ingress.grpc_sink import UnarySink, taken
from router.keys import Key
from router.options import GrpcOptions
from router.turns import in_turns
from router.types import Request

log = logging.getLogger(__name__)

Parse: TypeAlias = Callable[[bytes, Caller, Callable[[], str]], Request]


class InferenceService:
    """The methods, and the calls in flight."""

    def __init__(
        self,
        options: GrpcOptions,
        dispatch: Dispatch,
        fleet: Fleet,
        new_id: Callable[[], str],
        refused: Callable[[str, str], None],
        gate: Gate | None = None,
    ) -> None:
        """`refused` is called with ``"grpc"`` and the error's name for each error answered without dispatch."""
        self._options = options
        self._gate = gate
        self._dispatch = dispatch
        self._fleet = fleet
        self._new_id = new_id
        self._refused = refused
        self.calls: set[asyncio.Task[object]] = set()
        """In flight."""
        self.reading: set[asyncio.Task[object]] = set()
        """Those that have not sent their request yet."""
        self._cut: set[asyncio.Task[object]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def handlers(self) -> dict[str, Handler]:
        """By method name."""
        return {
            "Generate": self._guarded("Generate", self._streamed(generate_request)),
            "Chat": self._guarded("Chat", self._streamed(chat_request)),
            "Embed": self._guarded("Embed", self._embed),
            "Models": self._guarded("Models", self._models),
        }

    def cut_off(self, calls: set[asyncio.Task[object]]) -> None:
        """Ends these calls with UNAVAILABLE."""
        for call in calls - self._cut:
            self._cut.add(call)
            call.cancel()

    async def idle_within(self, timeout_s: float) -> bool:
        """Whether no call is in flight any more; waits for that."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def _guarded(self, method: str, handler: Callable[[_Asked], Awaitable[None]]) -> Handler:
        """The one place where a call's failure becomes its status."""

        async def guarded(call: Call) -> None:
            task = asyncio.current_task()
            assert task is not None, "an edge runs each handler in a task"
            asked = _Asked(method, call, task)
            self.calls.add(task)
            self._idle.clear()
            try:
                await self._answered(asked, handler)
            finally:
                self.calls.discard(task)
                self._cut.discard(task)
                if not self.calls:
                    self._idle.set()

        return guarded

    async def _answered(self, asked: _Asked, handler: Callable[[_Asked], Awaitable[None]]) -> None:
        try:
            if self._gate is not None:  # Before anything of its request is read.
                asked.key = self._gate.admit("grpc", asked.call.metadata())
            await handler(asked)
            return
        except KvlaneError as error:
            failure = error
            _log_failure(asked, error)
        except asyncio.CancelledError:
            if asked.task not in self._cut:
                raise
            asked.task.uncancel()
            failure = ShuttingDown("this router is going away")
            _log_failure(asked, failure)
        except Exception:
            log.exception("%s: a defect in the gRPC ingress or behind it", asked.described())
            failure = InternalError("internal error")
        if not asked.dispatched:
            self._refused("grpc", failure.name)
        await asked.call.fail(*render(failure, asked.request_id))

    def _streamed(self, parse: Parse) -> Callable[[_Asked], Awaitable[None]]:
        async def streamed(asked: _Asked) -> None:
            request = await self._request(asked, parse)
            sink = asked.call.stream(request.request_id)
            try:
                await self._dispatch.run(request, sink)
                sink.complete()
                await taken(sink, self._options.read_timeout_s)
            except ClientTooSlow:
                raise
            except Exception as error:
                # What came before the failure is the client's; the status goes out behind it.
                sink.stop()
                await taken(sink, self._options.read_timeout_s, error)
                raise
            finally:
                await sink.close()

        return streamed

    async def _request(self, asked: _Asked, parse: Parse) -> Request:
        """The request to route. Raises `InvalidRequest`, `RequestTimeout`, and `DeadlineExceeded` without time left."""
        metadata = asked.call.metadata()
        asked.request_id = request_ids.accepted(metadata.get("x-request-id")) or self._new_id()
        body = await self._body(asked)
        timeout_s = asked.call.time_remaining()
        caller = caller_of(metadata, timeout_s)
        if len(body) < grpc_large.LARGE_BYTES:
            request = parse(body, caller, lambda: asked.request_id)
        else:
            request = await in_turns(grpc_large.read(asked.method, body, caller, lambda: asked.request_id))
        if not request.lora and self._fleet.parent(request.model):  # An adapter asked for by its own name.
            request = msgspec.structs.replace(request, lora=request.model)
        if self._gate is not None and asked.key is not None:
            self._gate.check_model("grpc", asked.key, request.model, request.lora)
            request = msgspec.structs.replace(request, tenant=asked.key.tenant)
        asked.request_id = request.request_id
        if timeout_s is not None and timeout_s <= 0:
            raise DeadlineExceeded("the deadline passed before the request was read")
        asked.dispatched = True
        return request

    async def _body(self, asked: _Asked) -> bytes:
        """The serialized request. Raises `InvalidRequest` where the client sent none, and `RequestTimeout`."""
        limit_s = self._options.request_timeout_s
        self.reading.add(asked.task)
        try:
            async with asyncio.timeout(limit_s):
                body = await asked.call.read()
        except TimeoutError as error:
            raise RequestTimeout(f"the call brought no whole request message within {limit_s:g} s") from error
        finally:
            self.reading.discard(asked.task)
        if body is None:
            raise InvalidRequest("the call brought no request message, or one over the limit")
        return body

    async def _embed(self, asked: _Asked) -> None:
        request = await self._request(asked, embed_request)
        sink = UnarySink()
        await self._dispatch.run(request, sink)
        await asked.call.answer(sink.answer(), request.request_id)

    async def _models(self, asked: _Asked) -> None:
        models_request(await self._body(asked))
        models = [
            pb.Model(
                name=status.card.name,
                parent=status.card.parent,
                max_model_len=status.card.max_model_len,
                ready_replicas=status.ready_replicas,
            )
            for status in visible(self._fleet.models(), asked.key)
        ]
        await asked.call.answer(pb.ModelsResponse(models=models).SerializeToString())


class _Asked:
    """One call, and who it is in the logs."""

    __slots__ = ("call", "dispatched", "key", "method", "request_id", "task")

    def __init__(self, method: str, call: Call, task: asyncio.Task[object]) -> None:
        self.method = method
        self.call = call
        self.task = task
        self.request_id = ""
        self.key: Key | None = None
        """The API key that let it in, where keys are asked for."""
        self.dispatched = False
        """Dispatch has it, and counts how it ends."""

    def described(self) -> str:
        """For logs."""
        return f"{self.method} {self.request_id or '-'} from {self.call.peer()}"


def _log_failure(asked: _Asked, error: KvlaneError) -> None:
    if error.logged:
        return
    level = logging.INFO if error.fault is Fault.CLIENT else logging.WARNING
    log.log(level, "%s: %s: %r", asked.described(), error.name, cut(error.message, LOGGED_CHARS))
