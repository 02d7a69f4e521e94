"""The bench of routers side by side: its engine, which takes next to nothing, and the HTTP side of its replicas."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from kvlane.v1 import inference_pb2 as pb

from engine.base import StreamOut
from loadtests.peers import alone, load
from loadtests.peers.clients import HttpClient
from loadtests.peers.errors import PeerError
from loadtests.peers.load import Prompts, http_request
from loadtests.peers.metronome import KEPT_BLOCKS, Metronome, MetronomeOptions
from loadtests.peers.replicas import EngineOrder, Replicas
from loadtests.peers.worker import Worker
from router.errors import KvlaneError
from router.lane.frames import Submit, pack_chain
from router.types import Chain, Headers, Rpc

pytestmark = pytest.mark.slow


class Out(StreamOut):
    """Keeps what it was written."""

    def __init__(self) -> None:
        self.heads = 0
        self.tokens = 0
        self.raw = b""
        self.ended: str | None = None
        self.error: KvlaneError | None = None

    def head(self, status: int, headers: Headers) -> None:
        self.heads += 1

    def data(self, payload: bytes, tokens: int = 0, *, urgent: bool = False) -> None:
        self.tokens += tokens
        self.raw += payload

    def end(self, finish: str = "") -> None:
        self.ended = finish

    def fail(self, error: KvlaneError) -> None:
        self.error = error


def call(tokens: int, *, chain: Chain | None = None, prompt: str = "a prompt") -> Submit:
    body = json.dumps({"model": "sim", "prompt": prompt, "max_tokens": tokens, "stream": True}).encode()
    packed = pack_chain(chain) if chain is not None else b""
    return Submit(1, "r1", Rpc.HTTP, "POST", "/v1/completions", (), body, chain=packed)


async def made(step_ms: float = 20.0) -> Metronome:
    engine = Metronome(MetronomeOptions(step_ms=step_ms), "sim")
    await engine.start()
    return engine


async def turns(engine: Metronome, number: int) -> None:
    """So many beats."""
    left, done = [number], asyncio.Event()

    def stepped() -> None:
        left[0] -= 1
        if not left[0]:
            done.set()

    engine.on_step(stepped)
    async with asyncio.timeout(10):
        await done.wait()


async def test_each_beat_brings_each_stream_a_token_and_the_last_ends_it() -> None:
    engine, short, long = await made(), Out(), Out()
    engine.submit(call(2), short)
    engine.submit(call(3), long)
    assert engine.load().waiting == 2
    await turns(engine, 2)
    assert (short.tokens, short.ended, long.tokens, long.ended) == (2, "length", 2, None)
    assert engine.load().running == 1
    await turns(engine, 1)
    assert (long.tokens, long.ended, long.heads) == (3, "length", 1)
    assert long.raw.count(b'"text":"') == 3
    assert long.raw.endswith(b"data: [DONE]\n\n")
    assert engine.load().running == 0


async def test_who_comes_during_a_beat_is_in_the_next_one() -> None:
    engine, first, second = await made(), Out(), Out()
    engine.submit(call(2), first)
    await asyncio.sleep(0)
    engine.submit(call(2), second)
    await turns(engine, 1)
    assert (first.tokens, second.tokens) == (1, 0)
    await turns(engine, 1)
    assert (first.tokens, second.tokens) == (2, 1)
    await engine.close()
    assert second.error is not None


async def test_an_aborted_stream_gets_no_more() -> None:
    engine, stays, goes = await made(), Out(), Out()
    engine.submit(call(50), stays)
    abort = engine.submit(call(50), goes)
    await turns(engine, 1)
    abort()
    abort()
    await turns(engine, 3)
    assert (stays.tokens, goes.tokens, goes.ended) == (4, 1, None)
    await engine.close()


async def test_a_grpc_stream_gets_messages() -> None:
    engine, out = await made(), Out()
    request = pb.GenerateRequest(model="sim", text="a prompt", sampling=pb.SamplingParams(max_tokens=1))
    body = request.SerializeToString()
    engine.submit(Submit(1, "r1", Rpc.GRPC, "POST", "/kvlane.v1.Inference/Generate", (), body), out)
    await turns(engine, 1)
    message = pb.GenerateResponse.FromString(out.raw)
    assert (message.text, message.finish_reason, out.heads) == ("k42 ", "length", 0)


async def test_prompts_with_a_first_token_are_reported_as_cached_and_the_oldest_forgotten() -> None:
    engine = await made()
    feed = engine.cache().cursor()
    first = Chain(256, 0, (1, 2, 3), 768)
    engine.submit(call(1, chain=first), Out())
    assert not engine.cache().ledger.blocks()
    await turns(engine, 1)
    assert sorted(engine.cache().ledger.blocks()) == [1, 2, 3]
    report = feed.take()
    assert report is not None
    assert len(report.stored) == 3 * 8
    most = Chain(256, 0, tuple(range(10, 10 + KEPT_BLOCKS)), 256 * KEPT_BLOCKS)
    engine.submit(call(1, chain=most), Out())
    await turns(engine, 1)
    assert not {1, 2, 3} & set(engine.cache().ledger.blocks())


async def test_a_request_without_a_length_is_refused() -> None:
    engine, out = await made(), Out()
    engine.submit(Submit(1, "r1", Rpc.HTTP, "POST", "/v1/completions", (), b"{}"), out)
    assert out.error is not None
    elsewhere = Out()
    engine.submit(Submit(1, "r1", Rpc.HTTP, "POST", "/v1/nothing", (), call(1).body), elsewhere)
    assert elsewhere.error is not None


@asynccontextmanager
async def serving(order: EngineOrder) -> AsyncIterator[int]:
    engine = order.make("sim")
    await engine.start()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Worker(engine), "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]
    await engine.close()


SIMULATED = EngineOrder("simulated", {"time_scale": 0.0})
QUICK = EngineOrder(options={"step_ms": 0.0})


@pytest.mark.parametrize("order", [QUICK, SIMULATED], ids=["metronome", "simulated"])
async def test_a_worker_answers_a_closed_loop_whole(order: EngineOrder) -> None:
    async with serving(order) as port:
        tally = await load.closed_loop(HttpClient([port]), 4, 7, Prompts(32.0), rounds=3, limit_s=20)
    assert (tally.requests, tally.chunks, tally.tokens, tally.errors) == (12, 84, 84, 0)


async def answered(port: int, *parts: bytes, answers: int = 1) -> bytes:
    """What comes back until so many answers are whole, the parts sent one after the other."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    got = b""
    async with asyncio.timeout(10):
        for part in parts:
            writer.write(part)
            await asyncio.sleep(0.01)
        while got.count(b"0\r\n\r\n") < answers and got.count(b"content-length") < answers:
            got += await reader.read(1 << 16)
    writer.close()
    await writer.wait_closed()
    return got


async def test_a_request_may_come_in_parts_or_chunked_or_behind_another() -> None:
    whole = http_request("a prompt", 2)
    head, _, body = whole.partition(b"\r\n\r\n")
    line = head.partition(b"Content-Length")[0]
    middle = len(body) // 2
    pieces = b"".join(b"%x\r\n%b\r\n" % (len(each), each) for each in (body[:middle], body[middle:]))
    chunked = line + b"Transfer-Encoding: chunked\r\n\r\n" + pieces + b"0\r\n\r\n"
    async with serving(QUICK) as port:
        in_parts = await answered(port, whole[:50], whole[50:-10], whole[-10:])
        assert in_parts.count(b'"text":"') == 2
        assert (await answered(port, chunked)).count(b'"text":"') == 2
        assert (await answered(port, whole + whole + chunked, answers=3)).count(b'"text":"') == 6


async def test_a_worker_has_the_pages_that_routers_ask_for() -> None:
    async with serving(QUICK) as port:
        for path, status in (("/health", b"200"), ("/version", b"200"), ("/v1/models", b"200"), ("/other", b"404")):
            got = await answered(port, f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
            assert got.split(b" ")[1] == status, path


async def test_a_worker_stops_what_its_client_left() -> None:
    engine = await made(step_ms=5.0)
    server = await asyncio.get_running_loop().create_server(lambda: Worker(engine), "127.0.0.1", 0)
    async with server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.sockets[0].getsockname()[1])
        writer.write(http_request("a prompt", 100_000))
        await turns(engine, 2)
        assert engine.load().running == 1
        writer.close()
        async with asyncio.timeout(10):
            while engine.load().running:
                await asyncio.sleep(0.005)
    await engine.close()


async def test_a_worker_tells_what_it_refuses() -> None:
    async with serving(QUICK) as port:
        body = b'{"prompt": "x"}'
        request = b"POST /v1/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
        assert b"400" in (await answered(port, request)).partition(b"\r\n")[0]


def test_the_engine_alone_has_its_cost_too() -> None:
    assert alone.measure(Replicas(2, QUICK), 64, 200, 1.0) > 0


def test_an_engine_that_cannot_be_run_alone_is_told() -> None:
    with pytest.raises(PeerError, match="the engine alone"):
        alone.measure(Replicas(2, EngineOrder(options={"nothing": 1})), 4, 2, 1.0)
