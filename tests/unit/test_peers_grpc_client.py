"""The bench of routers side by side: its gRPC client, checked against grpcio's own server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import grpc
import pytest
from kvlane.v1 import inference_pb2 as pb

from loadtests.peers import http2, load
from loadtests.peers.children import free_port
from loadtests.peers.grpc_client import GENERATE, GrpcClient
from loadtests.peers.load import Prompts

Handler = Callable[[pb.GenerateRequest, grpc.aio.ServicerContext], AsyncIterator[pb.GenerateResponse]]  # type: ignore[type-arg]


class Known:
    """Counts what it was asked and what it sent."""

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.metadata: list[dict[str, str]] = []
        self.messages = 0

    async def generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]
    ) -> AsyncIterator[pb.GenerateResponse]:
        self.prompts.append(request.text)
        self.metadata.append({str(name): str(value) for name, value in context.invocation_metadata() or ()})
        for number in range(request.sampling.max_tokens):
            self.messages += 1
            yield pb.GenerateResponse(text=f"w{number} ")


async def refuse(
    request: pb.GenerateRequest, context: grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]
) -> AsyncIterator[pb.GenerateResponse]:
    yield pb.GenerateResponse(text="w0 ")
    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no more")


async def hang(
    request: pb.GenerateRequest, context: grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]
) -> AsyncIterator[pb.GenerateResponse]:
    yield pb.GenerateResponse(text="w0 ")
    await asyncio.sleep(60)


@asynccontextmanager
async def serving(handler: object) -> AsyncIterator[int]:
    server = grpc.aio.server()
    method = grpc.unary_stream_rpc_method_handler(
        handler,  # type: ignore[arg-type]
        request_deserializer=pb.GenerateRequest.FromString,
        response_serializer=pb.GenerateResponse.SerializeToString,
    )
    service, name = GENERATE.strip("/").split("/")
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {name: method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)


@pytest.mark.parametrize("kilobytes", [1.0, 200.0])
async def test_a_closed_loop_counts_what_the_server_sent(kilobytes: float) -> None:
    """A prompt of 200 KB is more than a server's first windows take."""
    server = Known()
    async with serving(server.generate) as port:
        client = GrpcClient(port, metadata=[("application", "x" * 200)])
        tally = await load.closed_loop(client, 9, 5, Prompts(kilobytes), rounds=3, limit_s=30)
    assert (tally.requests, tally.chunks, tally.tokens, tally.errors) == (27, 135, 135, 0)
    assert server.messages == 135
    assert {len(prompt) for prompt in server.prompts} == {int(1024 * kilobytes)}
    assert len(set(server.prompts)) == 27
    assert {metadata["application"] for metadata in server.metadata} == {"x" * 200}


async def test_a_status_other_than_ok_is_an_error_with_its_cause() -> None:
    async with serving(refuse) as port:
        tally = await load.closed_loop(GrpcClient(port), 2, 3, Prompts(1.0), rounds=2, limit_s=20)
    assert tally.causes == {"status 8: no more": 4}


async def test_a_method_that_is_not_there_is_an_error() -> None:
    async with serving(refuse) as port:
        client = GrpcClient(port, "/kvlane.v1.Inference/Nothing")
        tally = await load.closed_loop(client, 1, 3, Prompts(1.0), rounds=2, limit_s=20)
    assert tally.errors == 2
    assert "status 12" in next(iter(tally.causes))


async def test_what_is_not_answered_in_time_is_cancelled() -> None:
    async with serving(hang) as port:
        tally = await load.closed_loop(GrpcClient(port), 3, 3, Prompts(1.0), rounds=1, limit_s=0.3)
    assert (tally.requests, tally.errors) == (0, 3)


async def test_nobody_there_is_an_error_of_every_request() -> None:
    tally = await load.closed_loop(GrpcClient(free_port()), 2, 3, Prompts(1.0), rounds=2, limit_s=20)
    assert "no connection" in next(iter(tally.causes))
    assert tally.errors == 4


async def raw_server(answer: Callable[[asyncio.StreamWriter], Awaitable[None]]) -> asyncio.Server:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1 << 16)
        await answer(writer)
        await writer.drain()
        writer.close()

    return await asyncio.start_server(serve, "127.0.0.1", 0)


@pytest.mark.parametrize(
    ("frames", "cause"),
    [
        (b"", "the connection was lost"),
        (http2.frame(http2.RST_STREAM, 0, 1, (8).to_bytes(4, "big")), "the stream was reset: 8"),
        (http2.frame(http2.GOAWAY, 0, 0, bytes(8)), "the server goes away"),
        (http2.frame(http2.DATA, http2.END_STREAM, 1), "a stream without its status"),
    ],
)
async def test_a_stream_that_ends_otherwise_is_an_error_with_its_cause(frames: bytes, cause: str) -> None:
    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(http2.settings(initial_window_size=1 << 20) + frames)

    async with await raw_server(answer) as server:
        port = server.sockets[0].getsockname()[1]
        tally = await load.closed_loop(GrpcClient(port), 1, 1, Prompts(0.1), rounds=1, limit_s=10)
    assert tally.causes == {cause: 1}


def test_frames_are_cut_apart_wherever_they_were_cut() -> None:
    padded = http2.frame(http2.DATA, http2.PADDED, 3, b"\x02abc\x00\x00")
    weighted = http2.frame(http2.HEADERS, http2.PRIORITY, 3, b"\x00\x00\x00\x00\x10head")
    raw = http2.frame(http2.PING, 0, 0, b"12345678") + padded + weighted
    for size in (1, 2, 7, len(raw)):
        cutter, found = http2.Frames(), list[tuple[int, int, int, bytes]]()
        for at in range(0, len(raw), size):
            found += cutter.feed(raw[at : at + size])
        assert [payload for *_, payload in found] == [b"12345678", b"abc", b"head"]
