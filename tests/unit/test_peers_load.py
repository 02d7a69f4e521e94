"""The bench of routers side by side: the load generator, checked against servers that are known to the byte."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from loadtests.peers import load, trivial
from loadtests.peers.children import free_port
from loadtests.peers.clients import HttpClient
from loadtests.peers.grpc_client import GrpcClient
from loadtests.peers.load import Client, Due, Prompts

pytestmark = pytest.mark.slow

FIRST_TOKEN_S = 0.03
BETWEEN_S = 0.01

Handler = Callable[[dict[str, object], asyncio.StreamWriter], Awaitable[bool]]
"""Takes a request's body and writes the answer; false closes the connection."""


class Known:
    """A server that keeps count of what it was asked and what it sent."""

    def __init__(self, handler: Handler | None = None) -> None:
        self.prompts: list[str] = []
        self.connections = 0
        self.chunks = 0
        self._handler = handler or self.stream

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[int]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        async with server:
            yield server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = re.search(rb"Content-Length: (\d+)", head)
                assert length is not None
                body = json.loads(await reader.readexactly(int(length[1])))
                self.prompts.append(body["prompt"])
                if not await self._handler(body, writer):
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # The client has gone.
        finally:
            writer.close()

    async def stream(self, body: dict[str, object], writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        tokens = body["max_tokens"]
        assert isinstance(tokens, int)
        for number in range(tokens):
            await asyncio.sleep(BETWEEN_S if number else FIRST_TOKEN_S)
            event = b'data: {"choices":[{"text":"w%d "}]}\n\n' % number
            writer.write(b"%x\r\n%b\r\n" % (len(event), event))
            self.chunks += 1
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
        await writer.drain()
        return True


async def test_a_closed_loop_counts_what_the_server_sent() -> None:
    server = Known()
    async with server.serving() as port:
        tally = await load.closed_loop(HttpClient([port]), 4, 5, Prompts(1.0), rounds=3, limit_s=20)
    assert (tally.requests, tally.chunks, tally.tokens, tally.errors) == (12, 60, 60, 0)
    assert server.chunks == 60
    assert server.connections == 4
    assert len(tally.ttft_s) == 12
    assert min(tally.ttft_s) >= FIRST_TOKEN_S * 0.9
    assert max(tally.ttft_s) < tally.seconds
    assert len(tally.gaps_s) == 48
    assert sum(tally.gaps_s) >= 48 * BETWEEN_S * 0.8
    assert sum(tally.ttft_s) + sum(tally.gaps_s) <= 4 * tally.seconds


async def test_arrivals_do_not_wait_for_answers() -> None:
    server = Known()
    async with server.serving() as port:
        tally = await load.arrivals(HttpClient([port]), 200.0, 40, 80, 3, Prompts(1.0), limit_s=20)
    assert (tally.requests, tally.chunks, tally.errors) == (40, 120, 0)
    assert 0.2 < tally.seconds < 40 * (FIRST_TOKEN_S + 2 * BETWEEN_S), "they came one after the other"
    assert min(tally.ttft_s) >= FIRST_TOKEN_S * 0.9


async def test_an_open_loop_asks_each_at_its_time_and_waits_where_too_many_are_under_way() -> None:
    server = Known()
    due = [Due(0.0, 2, lambda: "one"), Due(0.05, 4, lambda: "two"), Due(0.07, 1, lambda: "three")]
    async with server.serving() as port:
        tally = await load.open_loop(HttpClient([port]), due, 1, limit_s=20)
    assert server.prompts == ["one", "two", "three"]
    assert server.connections == 1
    assert (tally.requests, tally.tokens, tally.errors) == (3, 7, 0)
    assert tally.wall_s == tally.seconds
    assert 0 < tally.cpu_s < tally.wall_s


async def test_saturation_counts_only_its_own_time() -> None:
    server = Known()
    async with server.serving() as port:
        tally = await load.saturation(HttpClient([port]), 4, 2, Prompts(1.0), seconds=0.3, limit_s=20)
    assert tally.seconds == 0.3
    assert not tally.errors
    assert server.chunks - 8 <= tally.chunks <= server.chunks


async def test_streams_are_shared_out_over_ports() -> None:
    one, other = Known(), Known()
    async with one.serving() as first, other.serving() as second:
        await load.closed_loop(HttpClient([first, second]), 6, 1, Prompts(1.0), rounds=2, limit_s=20)
    assert (one.connections, other.connections) == (3, 3)


async def test_refusals_are_errors_and_the_stream_asks_on() -> None:
    async def refuse(body: dict[str, object], writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 4\r\n\r\nbusy")
        return True

    server = Known(refuse)
    async with server.serving() as port:
        tally = await load.closed_loop(HttpClient([port]), 2, 3, Prompts(1.0), rounds=3, limit_s=20)
    assert (tally.requests, tally.chunks, tally.errors) == (0, 0, 6)
    assert tally.causes == {"HTTP/1.1 429 Too Many Requests": 6}
    assert len(server.prompts) == 6


async def test_a_lost_connection_is_an_error_and_another_is_opened() -> None:
    async def hang_up(body: dict[str, object], writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        return False

    server = Known(hang_up)
    async with server.serving() as port:
        tally = await load.closed_loop(HttpClient([port]), 2, 3, Prompts(1.0), rounds=2, limit_s=20)
    assert tally.causes == {"the connection was lost": 4}
    assert server.connections == 4


async def test_nobody_there_is_an_error_of_every_request() -> None:
    tally = await load.closed_loop(HttpClient([free_port()]), 2, 3, Prompts(1.0), rounds=2, limit_s=20)
    assert (tally.requests, tally.errors) == (0, 4)
    assert "no connection" in next(iter(tally.causes))


@pytest.mark.parametrize("kind", ["closed", "arrivals"])
async def test_a_server_that_does_not_answer_is_not_waited_for_longer_than_the_limit(kind: str) -> None:
    async def never(body: dict[str, object], writer: asyncio.StreamWriter) -> bool:
        await asyncio.sleep(60)
        return False

    async with Known(never).serving() as port:
        client, prompts = HttpClient([port]), Prompts(1.0)
        if kind == "closed":
            tally = await load.closed_loop(client, 3, 1, prompts, rounds=2, limit_s=0.2)
        else:
            tally = await load.arrivals(client, 1000.0, 3, 3, 1, prompts, limit_s=0.2)
    assert (tally.requests, tally.errors) == (0, 3)
    assert tally.seconds < 10


async def test_no_two_prompts_are_alike_unless_asked_for() -> None:
    server = Known()
    async with server.serving() as port:
        await load.closed_loop(HttpClient([port]), 3, 1, Prompts(4.0), rounds=2, limit_s=20)
        assert len(set(server.prompts)) == 6
        assert {len(prompt) for prompt in server.prompts} == {4096}
        server.prompts.clear()
        await load.closed_loop(HttpClient([port]), 3, 1, Prompts(4.0, repeated=True), rounds=2, limit_s=20)
    assert len(set(server.prompts)) == 3


@pytest.mark.parametrize("joined", [1, 3, 8])
@pytest.mark.parametrize("protocol", ["http", "grpc"])
async def test_the_trivial_server_writes_what_is_asked(protocol: str, joined: int) -> None:
    port = free_port()
    client: Client = GrpcClient(port) if protocol == "grpc" else HttpClient([port])
    task = asyncio.create_task(trivial.serve(protocol, port, joined))
    async with asyncio.timeout(10):
        while True:
            tally = await load.closed_loop(client, 3, 7, Prompts(4.0), rounds=2, limit_s=20)
            if "no connection" not in "".join(tally.causes):
                break
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert (tally.requests, tally.chunks, tally.tokens, tally.errors) == (6, 42, 42, 0)
