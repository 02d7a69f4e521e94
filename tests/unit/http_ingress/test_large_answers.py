"""Large answers, and what a client left unread: whole, in order, and never much in one turn of the event loop."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from router.ingress.http_connection import MAX_JOINED, PIECE_BYTES, Connection
from router.types import Headers, Request, Sink
from tests.unit.http_ingress.serving import SSE, Served, get, post, receipt, served

LARGE = bytes(range(256)) * (40 * PIECE_BYTES // 256) + b"end"


class Transport(asyncio.Transport):
    """A client that takes what it is given, unless it is full."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = bytearray()
        self.turns = [0]
        """Bytes taken in each turn of the loop."""
        self.closed = False
        self.ended = False

    def write(self, data: Any) -> None:
        self.taken += data
        self.turns[-1] += len(data)

    async def turn(self) -> None:
        self.turns.append(0)
        await asyncio.sleep(0)

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.ended = True


def connected(serving: Served) -> tuple[Connection, Transport]:
    connection, transport = Connection(serving.ingress, asyncio.get_running_loop()), Transport()
    connection.connection_made(transport)
    return connection, transport


def answers(*payloads: bytes, headers: Headers = SSE) -> Any:
    async def script(request: Request, sink: Sink) -> None:
        sink.routed(receipt(request))
        sink.head(200, headers)
        for payload in payloads:
            if len(payload) >= PIECE_BYTES:
                sink.large(memoryview(payload), 1)  # type: ignore[attr-defined]
            else:
                sink.data(payload, 1)

    return script


def sized(size: int) -> Headers:
    return (("content-type", "application/json"), ("content-length", str(size)))


@pytest.mark.parametrize("headers", [SSE, sized(len(LARGE))], ids=["chunked", "sized"])
async def test_a_large_answer_arrives_whole(headers: Headers) -> None:
    async with served(answers(LARGE, headers=headers)) as serving:
        answer = await serving.say(post())
    assert answer.status == 200
    assert answer.body == LARGE


async def test_large_and_small_payloads_arrive_in_order_and_the_connection_lives_on() -> None:
    async with served(answers(b"before", LARGE, b"between", LARGE[:-3], b"after")) as serving:
        client = await serving.connect()
        for _ in range(2):
            client.write(post())
            assert (await client.answer()).body == b"before" + LARGE + b"between" + LARGE[:-3] + b"after"
        client.write(get("/healthz"))
        assert (await client.answer()).body == b"ok"
        await client.close()


async def test_an_answer_until_the_connection_ends_is_whole_too() -> None:
    async with served(answers(LARGE)) as serving:
        client = await serving.connect()
        client.write(post().replace(b"HTTP/1.1", b"HTTP/1.0"))
        await client.head()
        assert await client.rest() == LARGE
        await client.close()


async def test_a_head_request_gets_no_large_body() -> None:
    async with served(answers(LARGE, headers=sized(len(LARGE)))) as serving:
        serving.fleet.routes["/v1/models/x/file"] = ("GET",)
        client = await serving.connect()
        client.write(get("/v1/responses/x", "x-kvlane-model: tiny", method="HEAD"))
        assert (await client.answer(head_only=True)).headers["content-length"] == str(len(LARGE))
        client.write(get("/healthz"))
        assert (await client.answer()).body == b"ok"
        await client.close()


async def test_an_answer_longer_than_its_length_breaks_the_connection() -> None:
    async with served(answers(LARGE, headers=sized(len(LARGE) - 1))) as serving:
        client = await serving.connect()
        client.write(post())
        status, _ = await client.head()
        assert status == 200
        with pytest.raises(ConnectionError):
            await client.rest()
        await client.close()


async def test_a_large_answer_goes_out_in_pieces_between_which_the_loop_turns() -> None:
    async with served(answers(LARGE)) as serving:
        connection, transport = connected(serving)
        connection.data_received(post())
        while not transport.taken.endswith(b"\r\n0\r\n\r\n"):
            await transport.turn()
        assert LARGE in transport.taken
        assert max(transport.turns) < 2 * PIECE_BYTES
        assert connection.flowing
        connection.connection_lost(None)


async def test_what_a_client_left_unread_goes_out_in_pieces_and_stops_when_it_stops_again() -> None:
    events = [b"data: %06d %b\n\n" % (number, b"x" * 900) for number in range(4 * MAX_JOINED)]
    paused = asyncio.Event()

    async def script(request: Request, sink: Sink) -> None:
        await paused.wait()
        await answers(*events)(request, sink)

    async with served(script, stream_buffer_bytes=64 << 20) as serving:
        connection, transport = connected(serving)
        connection.data_received(post())
        connection.pause_writing()
        paused.set()
        await serving.until(serving.dispatch.ended.is_set)
        assert not transport.taken
        connection.resume_writing()
        await transport.turn()
        connection.pause_writing()
        taken = len(transport.taken)
        for _ in range(5):
            await transport.turn()
        assert 0 < len(transport.taken) == taken < 3 * PIECE_BYTES
        connection.resume_writing()
        while not transport.taken.endswith(b"0\r\n\r\n"):
            await transport.turn()
        assert max(transport.turns) < 2 * PIECE_BYTES
        assert transport.taken.count(b"data: ") == len(events)
        connection.connection_lost(None)


@pytest.mark.parametrize("goodbye", ["close", "half-close"])
async def test_a_connection_ends_once_all_of_a_large_answer_is_out(goodbye: str) -> None:
    async with served(answers(LARGE)) as serving:
        connection, transport = connected(serving)
        connection.data_received(post("/v1/chat/completions", post().split(b"\r\n\r\n")[1], "Connection: close"))
        await serving.until(lambda: bool(transport.taken))
        await serving.until(serving.dispatch.ended.is_set)
        await asyncio.sleep(0)
        assert not transport.closed
        if goodbye == "half-close":
            assert connection.eof_received()
        while not transport.closed:
            await transport.turn()
        assert transport.taken.endswith(b"end\r\n0\r\n\r\n")
        connection.connection_lost(None)


async def test_nothing_is_written_to_a_connection_that_was_cut_in_the_middle() -> None:
    async with served(answers(LARGE, headers=sized(len(LARGE) + 1))) as serving:  # It ends too early.
        connection, transport = connected(serving)
        connection.data_received(post())
        await serving.until(lambda: transport.closed)
        taken = len(transport.taken)
        for _ in range(3):
            await transport.turn()
        assert len(transport.taken) == taken
        connection.connection_lost(None)
