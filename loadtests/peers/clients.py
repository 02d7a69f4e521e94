"""The two kinds of client: HTTP/1.1 keep-alive connections, and calls on gRPC channels."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import grpc
from kvlane.v1 import inference_pb2 as pb

from loadtests.peers.answers import Answer, read_grpc, read_http
from loadtests.peers.load import Caller, Client, HttpCaller
from loadtests.processes import MODEL

CHANNELS: Final = 4


class HttpClient:
    """Connections shared out over `ports`."""

    read = staticmethod(read_http)

    def __init__(self, ports: Sequence[int]) -> None:
        self._ports = ports

    @asynccontextmanager
    async def callers(self, streams: int) -> AsyncIterator[list[Caller]]:
        made = [HttpCaller(self._ports[number % len(self._ports)]) for number in range(streams)]
        try:
            yield list(made)
        finally:
            for caller in made:
                caller.close()


class GrpcClient:
    """Calls of `kvlane.v1.Inference/Generate`, or of another method of the same messages, on a few channels."""

    read = staticmethod(read_grpc)

    def __init__(
        self, port: int, method: str = "/kvlane.v1.Inference/Generate", metadata: tuple[tuple[str, str], ...] = ()
    ) -> None:
        self._port = port
        self._method = method
        self._metadata = metadata

    @asynccontextmanager
    async def callers(self, streams: int) -> AsyncIterator[list[Caller]]:
        # Without a pool of its own, equal channels would share one connection.
        channels = [
            grpc.aio.insecure_channel(f"127.0.0.1:{self._port}", options=[("grpc.use_local_subchannel_pool", 1)])
            for _ in range(min(CHANNELS, streams))
        ]
        # Raw bytes: they are parsed after the load.
        calls = [channel.unary_stream(self._method) for channel in channels]  # type: ignore[var-annotated]
        try:
            yield [_GrpcCaller(calls[number % len(calls)], self._metadata) for number in range(streams)]
        finally:
            await asyncio.gather(*(channel.close() for channel in channels))


class _GrpcCaller:
    def __init__(self, call: Any, metadata: tuple[tuple[str, str], ...]) -> None:
        self._call = call
        self._metadata = metadata

    async def ask(self, prompt: str, tokens: int) -> Answer:
        answer = Answer(tokens)
        request = pb.GenerateRequest(model=MODEL, text=prompt, sampling=pb.SamplingParams(max_tokens=tokens))
        packed = request.SerializeToString()
        answer.asked_at = time.perf_counter()
        try:
            async for message in self._call(packed, metadata=self._metadata):
                answer.times.append(time.perf_counter())
                answer.pieces.append(message)
        except grpc.aio.AioRpcError as error:
            answer.failure = f"{error.code().name}: {error.details()}"
        return answer


def client(protocol: str, ports: Sequence[int]) -> Client:
    """For a system that speaks `protocol` on these ports."""
    return HttpClient(ports) if protocol == "http" else GrpcClient(ports[0])
