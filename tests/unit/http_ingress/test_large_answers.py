"""Large answers, and what a client left unread: whole, in order, and never much in one turn of the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from router.ingress.http_connection import LINGER_S, MAX_JOINED, PIECE_BYTES, Connection
from router.types import Headers, Request, Sink
from tests.unit.http_ingress.serving import CHAT, DEADLINE_S, SSE, Served, get, post, receipt, served

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
        self.unread = 0
        self.after_write: Callable[[], None] = lambda: None
        self.lost: Callable[[None], None] = lambda error: None

    def write(self, data: Any) -> None:
        self.taken += data
        self.turns[-1] += len(data)
        self.after_write()

    async def turn(self) -> None:
        self.turns.append(0)
        await asyncio.sleep(0)

    def get_write_buffer_size(self) -> int:
        return self.unread

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True
        asyncio.get_running_loop().call_soon(self.lost, None)

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.ended = True


def connected(serving: Served) -> tuple[Connection, Transport]:
    connection, transport = Connection(serving.ingress, asyncio.get_running_loop()), Transport()
    connection.connection_made(transport)
    transport.lost = connection.connection_lost
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


async def test_an_answer_until_the_connection_ends_that_nobody_reads_does_not_end_as_if_it_were_whole() -> None:
    async with served(answers(LARGE)) as serving:
        client = await serving.connect()
        client.write(post().replace(b"HTTP/1.1", b"HTTP/1.0"))
        await client.head()
        await serving.until(serving.dispatch.ended.is_set)
        async with asyncio.timeout(DEADLINE_S):
            while serving.ingress.connections:
                serving.pass_time(LINGER_S + 1)
                await asyncio.sleep(0)
        with pytest.raises(ConnectionError):
            await client.rest()
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


async def test_an_answer_longer_than_its_length_from_the_first_payload_on_is_an_error_response() -> None:
    async with served(answers(LARGE, headers=sized(len(LARGE) - 1))) as serving:
        answer = await serving.say(post())
    assert answer.status == 500
    assert b"longer than its content-length" in answer.body


async def test_an_answer_that_becomes_longer_than_its_length_breaks_the_connection() -> None:
    async with served(answers(b"[", LARGE, headers=sized(len(LARGE)))) as serving:
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


async def test_a_client_that_reads_the_last_of_an_answer_as_its_time_ends_is_not_dropped() -> None:
    async with served(body_timeout_s=30) as serving:
        connection, transport = connected(serving)
        connection.data_received(get("/healthz"))
        connection.pause_writing()
        connection.data_received(get("/healthz"))
        connection.resume_writing()
        serving.pass_time(31)  # In the same turn.
        assert not transport.closed
        await transport.turn()
        assert transport.taken.count(b"200 OK") == 2
        connection.connection_lost(None)


async def test_each_answer_of_a_pipeline_has_its_own_time_to_be_read() -> None:
    async with served(body_timeout_s=30) as serving:
        connection, transport = connected(serving)
        transport.after_write = connection.pause_writing
        transport.unread = 100
        for _ in range(4):
            connection.data_received(get("/healthz"))
        for answered in range(1, 4):
            assert transport.taken.count(b"200 OK") == answered
            serving.pass_time(20)
            assert not transport.closed
            transport.unread = 100
            connection.resume_writing()
            await transport.turn()
        connection.connection_lost(None)


async def test_a_client_is_told_to_continue_after_the_answers_to_what_it_asked_before() -> None:
    head = post("/tokenize", CHAT, "Expect: 100-continue").partition(b"\r\n\r\n")[0]
    async with served() as serving:
        connection, transport = connected(serving)
        connection.data_received(get("/healthz"))
        connection.pause_writing()
        connection.data_received(get("/healthz") + head + b"\r\n\r\n")
        connection.resume_writing()
        await transport.turn()
        assert transport.taken.count(b"200 OK") == 2
        assert transport.taken.endswith(b"100 Continue\r\n\r\n")
        connection.connection_lost(None)
