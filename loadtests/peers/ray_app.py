"""Simulated replicas as a Ray Serve application, on a Ray of its own: `python -m loadtests.peers.ray_app ORDER`.

Serves until it is told to end. The replicas run the same engine as everywhere; over HTTP they are bare ASGI, since a
framework would cost more than what is measured. Batches are as large as the engine's, so that Serve queues nothing.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import msgspec
import ray
from kvlane.v1 import inference_pb2 as pb
from ray import serve
from ray.serve.config import HTTPOptions, gRPCOptions

from engine.base import Engine, StreamOut
from loadtests.peers.grpc_client import GENERATE
from loadtests.peers.ray_serve import APP, Order
from loadtests.peers.replicas import EngineOrder
from loadtests.processes import MODEL
from router.errors import KvlaneError
from router.lane.frames import Submit
from router.types import Headers, Rpc

MAX_ONGOING: Final = 2048


class _Out(StreamOut):
    """Keeps what the engine writes until the stream's own task takes it."""

    def __init__(self) -> None:
        self.status = 200
        self.headers: Headers = ()
        self.pieces: asyncio.Queue[bytes | KvlaneError | None] = asyncio.Queue()

    def head(self, status: int, headers: Headers) -> None:
        self.status, self.headers = status, headers

    def data(self, payload: bytes, tokens: int = 0, *, urgent: bool = False) -> None:
        self.pieces.put_nowait(payload)

    def end(self, finish: str = "") -> None:
        self.pieces.put_nowait(None)

    def fail(self, error: KvlaneError) -> None:
        self.pieces.put_nowait(error)


class _Engine:
    """One replica's; begins with the first request, on the loop that requests run on."""

    def __init__(self, order: EngineOrder) -> None:
        self._order = order
        self._engine: Engine | None = None

    async def stream(self, rpc: Rpc, path: str, body: bytes) -> AsyncIterator[tuple[_Out, bytes]]:
        """What the engine writes, with the stream's head."""
        if self._engine is None:
            engine = self._order.make(MODEL)
            await engine.start()
            self._engine = engine
        out = _Out()
        abort = self._engine.submit(Submit(1, "ray", rpc, "POST", path, (), body), out)
        try:
            while (piece := await out.pieces.get()) is not None:
                if isinstance(piece, KvlaneError):
                    raise piece
                yield out, piece
        finally:
            abort()


Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class HttpApp:
    """ASGI."""

    def __init__(self, order: EngineOrder) -> None:
        self._engine = _Engine(order)

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        begun = False
        async for out, piece in self._engine.stream(Rpc.HTTP, scope["path"], body):
            if not begun:
                begun = True
                headers = [(name.encode(), value.encode()) for name, value in out.headers]
                await send({"type": "http.response.start", "status": out.status, "headers": headers})
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class GrpcApp:
    """The method of the gRPC service that is measured."""

    def __init__(self, order: EngineOrder) -> None:
        self._engine = _Engine(order)

    async def Generate(self, request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        async for _, piece in self._engine.stream(Rpc.GRPC, GENERATE, request.SerializeToString()):
            yield pb.GenerateResponse.FromString(piece)


def main(order: Order) -> int:
    stop = threading.Event()
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=order.temp_dir)
    # Joining Ray sets handlers of its own.
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    grpc = order.protocol == "grpc"
    serve.start(
        proxy_location="HeadOnly",
        http_options=HTTPOptions(host="127.0.0.1", port=0 if grpc else order.port),
        grpc_options=gRPCOptions(
            port=order.port, grpc_servicer_functions=["kvlane.v1.inference_pb2_grpc.add_InferenceServicer_to_server"]
        )
        if grpc
        else None,
    )
    options = {
        "name": APP,
        "num_replicas": order.replicas,
        "max_ongoing_requests": MAX_ONGOING,
        "ray_actor_options": {"num_cpus": 0.1},
    }
    made = GrpcApp if grpc else serve.ingress(HttpApp(order.engine))(type("Http", (), {}))
    bound = serve.deployment(made, **options)
    serve.run(bound.bind(order.engine) if grpc else bound.bind(), name=APP, route_prefix="/")
    stop.wait()
    serve.shutdown()
    ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(msgspec.json.decode(sys.argv[1], type=Order)))
