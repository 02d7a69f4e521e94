"""A running gRPC ingress for tests: real server, real channel, a scripted dispatch behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Literal

import grpc
import grpc.aio
import pytest
from kvlane.v1 import inference_pb2 as pb

from router.errors import KvlaneError
from router.ingress.base import ModelStatus, Readiness
from router.ingress.grpc import GrpcIngress
from router.ingress.h2_edge import H2Edge
from router.lane.frames import End
from router.options import GrpcOptions
from router.types import ModelCard, Reason, Receipt, Request, Sink

Script = Callable[[Request, Sink], Awaitable[None]]
EDGE: Literal["h2", "aio"] = "h2"
"""The edge that is served; tests that hold for both set it in turn."""
SERVICE = "/kvlane.v1.Inference/"
PROMPT = pb.GenerateRequest(model="tiny", text="hi")


class FakeDispatch:
    """Runs a script per request, and tells what happened to it."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[Request] = []
        self.running = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.failed = asyncio.Event()

    async def run(self, request: Request, sink: Sink) -> End:
        self.requests.append(request)
        self.running.set()
        try:
            await self.script(request, sink)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        except KvlaneError:
            self.failed.set()
            raise
        return End(finish="stop")


class FakeFleet:
    def models(self) -> tuple[ModelStatus, ...]:
        return (
            ModelStatus(ModelCard("lora-a", parent="tiny", max_model_len=64), ready_replicas=1),
            ModelStatus(ModelCard("tiny", max_model_len=64), ready_replicas=2),
        )

    def parent(self, model: str) -> str:
        return "tiny" if model == "lora-a" else ""

    def methods(self, path: str) -> tuple[str, ...]:
        return ()

    def readiness(self) -> Readiness:
        return Readiness(ready=True, models={})


class Served:
    """A running ingress and a channel to it."""

    def __init__(self, ingress: GrpcIngress, dispatch: FakeDispatch, port: int, channel: grpc.aio.Channel) -> None:
        self.ingress = ingress
        self.dispatch = dispatch
        self.target = f"127.0.0.1:{port}"
        self.channel = channel
        self.refused: list[tuple[str, str]] = []
        """What the ingress answered without dispatch."""
        self.handshakes: list[tuple[str, str]] = []
        """TLS handshakes that were refused; the edge `aio` tells of none."""

    def generate(self, request: pb.GenerateRequest = PROMPT, **call: Any) -> grpc.aio.UnaryStreamCall[Any, Any]:
        return generate_on(self.channel)(request, **call)

    async def embed(self, *texts: str, **call: Any) -> pb.EmbedResponse:
        method = self.channel.unary_unary(
            f"{SERVICE}Embed",
            request_serializer=pb.EmbedRequest.SerializeToString,
            response_deserializer=pb.EmbedResponse.FromString,
        )
        return await method(pb.EmbedRequest(model="tiny", texts=texts), **call)

    async def drain(self, method: str, body: bytes, **call: Any) -> None:
        """Sends raw request bytes and reads the answer to its end."""
        raw: Callable[..., grpc.aio.UnaryStreamCall[Any, Any]] = self.channel.unary_stream(SERVICE + method)
        async for _ in raw(body, **call):
            pass

    async def error(self, method: str, body: bytes, **call: Any) -> grpc.aio.AioRpcError:
        """The error that raw request bytes get."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.drain(method, body, **call)
        return caught.value


def edge_of(served: Served) -> H2Edge:
    edge = served.ingress._edge
    assert isinstance(edge, H2Edge)
    return edge


def generate_on(channel: grpc.aio.Channel) -> Callable[..., grpc.aio.UnaryStreamCall[Any, Any]]:
    return channel.unary_stream(
        f"{SERVICE}Generate",
        request_serializer=pb.GenerateRequest.SerializeToString,
        response_deserializer=pb.GenerateResponse.FromString,
    )


@asynccontextmanager
async def serving(script: Script, **options: Any) -> AsyncIterator[Served]:
    dispatch = FakeDispatch(script)
    ids = iter(range(1_000_000))
    refused: list[tuple[str, str]] = []
    handshakes: list[tuple[str, str]] = []
    gate = options.pop("gate", None)
    ingress = GrpcIngress(
        GrpcOptions(port=0, **{"edge": EDGE} | options),
        dispatch,
        FakeFleet(),
        new_id=lambda: f"made-{next(ids)}",
        refused=lambda rpc, error: refused.append((rpc, error)),
        handshake_refused=lambda section, reason: handshakes.append((section, reason)),
        gate=gate,
    )
    port = await ingress.start()
    arguments = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=arguments) as channel:
            served = Served(ingress, dispatch, port, channel)
            served.refused = refused
            served.handshakes = handshakes
            yield served
    finally:
        await ingress.stop(0)


def receipt(request: Request, replica: str = "replica-1", reason: Reason = Reason.RANDOM) -> Receipt:
    return Receipt(request.request_id, replica, "random", reason, 3)


def message(text: str) -> bytes:
    return pb.GenerateResponse(text=text).SerializeToString()


def says(*texts: str) -> Script:
    async def script(request: Request, sink: Sink) -> None:
        sink.routed(receipt(request))
        for text in texts:
            sink.data(message(text), 1)
            await asyncio.sleep(0)

    return script


def fails(error: Exception, *texts: str) -> Script:
    async def script(request: Request, sink: Sink) -> None:
        await says(*texts)(request, sink)
        raise error

    return script


def hangs(*texts: str) -> Script:
    async def script(request: Request, sink: Sink) -> None:
        await says(*texts)(request, sink)
        await asyncio.Event().wait()

    return script


async def until(condition: Callable[[], bool]) -> None:
    """Lets the loop turn until the condition holds."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


async def within(awaitable: Awaitable[Any], seconds: float = 10) -> Any:
    async with asyncio.timeout(seconds):
        return await awaitable


def trailers(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    return dict(error.trailing_metadata() or ())
