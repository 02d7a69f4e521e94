"""Many requests at one moment: each is answered, and few of them are taken up in one turn of the loop."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from router.ingress.http import READS_PER_TURN
from router.ingress.http_connection import MAX_HELD_BYTES, Connection
from router.types import Request, Sink
from tests.unit.http_ingress.serving import SSE, Served, echo, get, post, served

CROWD = 100
pytestmark = pytest.mark.timeout(60)


class Pipe(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = False

    def write(self, data: Any) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def can_write_eof(self) -> bool:
        return False

    def is_closing(self) -> bool:
        return self.closed

    def get_write_buffer_size(self) -> int:
        return 0


class Guests:
    """Connections whose bytes come when a test says so."""

    def __init__(self, serving: Served) -> None:
        self.serving = serving
        self._site = cast(Any, serving.ingress)
        self.all: list[tuple[Connection, Pipe]] = []

    def come(self) -> tuple[Connection, Pipe]:
        connection, pipe = Connection(self._site, asyncio.get_running_loop()), Pipe()
        connection.connection_made(pipe)
        self.all.append((connection, pipe))
        return connection, pipe

    def leave_before(self, count: int) -> None:
        """So many leave at this moment."""
        for _ in range(count):
            self._site.pace.run(asyncio.get_running_loop(), bool)

    def fill_turn(self) -> None:
        """Others take all that there is to have in this turn."""
        for _ in range(READS_PER_TURN):
            self.come()[0].data_received(get("/healthz"))


@asynccontextmanager
async def guests(serving: Served) -> AsyncIterator[Guests]:
    there = Guests(serving)
    try:
        yield there
    finally:
        for connection, _ in there.all:
            connection.connection_lost(None)


async def turns(number: int) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def test_few_of_a_crowd_begin_in_one_turn_and_all_are_answered() -> None:
    async with served() as serving, guests(serving) as there:
        asked = serving.dispatch.requests
        for number in range(CROWD):
            there.come()[0].data_received(post(body=b'{"model":"tiny","n":%d}' % number))
        seen = [0]
        while len(asked) < CROWD:
            await asyncio.sleep(0)
            seen.append(len(asked))
        assert max(after - before for before, after in itertools.pairwise(seen)) <= READS_PER_TURN
        assert [request.body for request in asked] == [b'{"model":"tiny","n":%d}' % number for number in range(CROWD)]
        await turns(3)
        for number, (_, pipe) in enumerate(there.all):
            assert pipe.written.endswith(b'POST /v1/chat/completions {"model":"tiny","n":%d}' % number)


async def test_a_crowd_of_real_clients_is_answered() -> None:
    async with served() as serving:
        clients = await asyncio.gather(*(serving.connect() for _ in range(CROWD)))
        for _ in range(3):
            for number, client in enumerate(clients):
                client.write(post(body=b'{"model":"tiny","n":%d}' % number))
            answers = [await client.answer() for client in clients]
            assert all(answer.body.endswith(b'"n":%d}' % number) for number, answer in enumerate(answers))
        await asyncio.gather(*(client.close() for client in clients))


async def test_a_request_that_comes_in_pieces_while_others_have_their_turn_is_read_whole() -> None:
    async with served() as serving, guests(serving) as there:
        there.fill_turn()
        connection, pipe = there.come()
        request = post(body=b'{"model":"tiny","n":1}')
        for at in range(0, len(request), 40):
            connection.data_received(request[at : at + 40])
        assert not pipe.written
        await turns(5)
        assert pipe.written.endswith(b'{"model":"tiny","n":1}')
        assert len(serving.dispatch.requests) == 1


async def test_pipelined_requests_are_answered_in_order_around_a_wait() -> None:
    async with served() as serving, guests(serving) as there:
        connection, pipe = there.come()
        connection.data_received(post(body=b'{"model":"tiny","n":0}'))
        there.fill_turn()
        connection.data_received(post(body=b'{"model":"tiny","n":1}'))
        connection.data_received(post(body=b'{"model":"tiny","n":2}'))
        await turns(12)
        bodies = [request.body for request in serving.dispatch.requests]
        assert bodies == [b'{"model":"tiny","n":%d}' % number for number in range(3)]
        assert pipe.written.count(b"HTTP/1.1 200 ") == 3


async def test_a_client_that_asks_and_ends_its_side_while_others_have_their_turn_is_answered() -> None:
    async with served() as serving, guests(serving) as there:
        there.fill_turn()
        connection, pipe = there.come()
        connection.data_received(get("/healthz"))
        connection.eof_received()
        assert pipe.written.startswith(b"HTTP/1.1 200 ")
        assert pipe.closed


async def test_a_client_that_is_gone_before_its_turn_asks_nothing() -> None:
    async with served() as serving, guests(serving) as there:
        there.fill_turn()
        connection, pipe = there.come()
        connection.data_received(post())
        connection.connection_lost(None)
        await turns(5)
        assert not serving.dispatch.requests
        assert not pipe.written


async def test_a_request_that_waits_for_its_turn_when_the_server_retires_is_served() -> None:
    async with served() as serving, guests(serving) as there:
        there.fill_turn()
        connection, pipe = there.come()
        connection.data_received(post())
        connection.retire()
        assert not pipe.closed
        await turns(6)
        assert pipe.written.startswith(b"HTTP/1.1 200 ")
        assert b"connection: close" in pipe.written
        assert pipe.closed


async def test_input_of_one_that_waits_is_bounded_and_judged() -> None:
    async with served() as serving, guests(serving) as there:
        there.fill_turn()
        connection, pipe = there.come()
        connection.data_received(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999\r\n\r\n")
        for _ in range(MAX_HELD_BYTES // 65536 + 1):
            connection.data_received(bytes(65536))
        assert pipe.written.startswith(b"HTTP/1.1 413 ")


async def test_the_rest_of_a_body_takes_nobodys_turn() -> None:
    async with served() as serving, guests(serving) as there:
        request = post(body=b'{"model":"tiny","prompt":"%b"}' % (b"x" * 50_000))
        connection, _ = there.come()
        connection.data_received(request[:10_000])
        await turns(2)
        there.fill_turn()
        connection.data_received(request[10_000:40_000])
        assert not connection._held_input
        connection.data_received(request[40_000:])
        await turns(4)
        assert len(serving.dispatch.requests) == 1


async def test_what_clients_asked_who_are_gone_before_their_turn_runs_nowhere() -> None:
    async with served() as serving, guests(serving) as there:
        there.fill_turn()
        for _ in range(20):
            connection, _ = there.come()
            connection.data_received(post())
            connection.eof_received()
        await turns(10)
        assert not serving.dispatch.requests


@pytest.mark.parametrize("kept", [False, True], ids=["new", "kept alive"])
async def test_a_deadline_that_passes_while_a_request_waits_for_its_turn_costs_it_nothing(kept: bool) -> None:
    async with served() as serving, guests(serving) as there:
        connection, pipe = there.come()
        if kept:
            connection.data_received(post())
            await turns(4)
        pipe.written = b""
        there.fill_turn()
        connection.data_received(post())
        serving.clock.now += 1e6
        connection.expired()
        await turns(4)
        assert pipe.written.startswith(b"HTTP/1.1 200 ")


async def test_a_connection_whose_input_turns_out_to_be_nothing_retires_in_its_turn() -> None:
    async with served() as serving, guests(serving) as there:
        there.fill_turn()
        connection, pipe = there.come()
        connection.data_received(b"\r\n")
        connection.retire()
        await turns(4)
        assert pipe.closed


async def test_a_defect_in_a_later_turn_costs_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    async with served() as serving, guests(serving) as there:
        there.fill_turn()
        connection, pipe = there.come()
        connection.data_received(post())

        def fail(data: bytes) -> None:
            raise RuntimeError("a defect")

        monkeypatch.setattr(connection._parser, "feed", fail)
        await turns(4)
        assert pipe.closed
        assert [str(context["exception"]) for context in serving.defects] == ["a defect"]
        serving.defects.clear()


async def hang(request: Request, sink: Sink) -> None:
    """A stream that goes on for ever."""
    sink.head(200, SSE)
    while True:
        sink.data(b"data: x\n\n", 1)
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("vanished", [False, True], ids=["closed", "vanished"])
async def test_few_of_those_who_leave_together_are_given_up_in_one_turn(vanished: bool) -> None:
    async with served(hang) as serving, guests(serving) as there:
        for _ in range(CROWD):
            there.come()[0].data_received(post())
        await serving.until(lambda: len(serving.dispatch.requests) == CROWD)
        for connection, _ in there.all:
            if vanished:
                connection.connection_lost(ConnectionResetError())
            else:
                assert connection.eof_received()
        seen = [0]
        while len(serving.dispatch.outcome) < CROWD:
            await asyncio.sleep(0)
            seen.append(len(serving.dispatch.outcome))
        assert max(after - before for before, after in itertools.pairwise(seen)) <= READS_PER_TURN
        assert set(serving.dispatch.outcome) == {asyncio.CancelledError}
        assert vanished or all(pipe.closed for _, pipe in there.all)


async def test_real_clients_that_leave_together_leave_nothing_behind() -> None:
    async with served(hang) as serving:
        clients = await asyncio.gather(*(serving.connect() for _ in range(CROWD)))
        for client in clients:
            client.write(post())
        await serving.until(lambda: len(serving.dispatch.requests) == CROWD)
        for client in clients:
            client.writer.transport.abort()
        await serving.until(lambda: len(serving.dispatch.outcome) == CROWD and serving.ingress.connections == 0)
        assert set(serving.dispatch.outcome) == {asyncio.CancelledError}


async def test_an_answer_that_ends_while_its_client_waits_to_be_given_up_closes_the_connection() -> None:
    go_on = asyncio.Event()

    async def wait(request: Request, sink: Sink) -> None:
        await go_on.wait()
        await echo(request, sink)

    async with served(wait) as serving, guests(serving) as there:
        connection, pipe = there.come()
        connection.data_received(post())
        await turns(2)
        there.fill_turn()
        there.leave_before(3 * READS_PER_TURN)
        assert connection.eof_received()
        go_on.set()
        await turns(6)
        assert pipe.closed
        assert serving.dispatch.outcome == [None]
        assert pipe.written.startswith(b"HTTP/1.1 200 ")


async def test_nonsense_that_waits_for_its_turn_is_refused_then() -> None:
    async with served() as serving, guests(serving) as there:
        there.fill_turn()
        connection, pipe = there.come()
        connection.data_received(b"nonsense\r\n\r\n")
        assert not pipe.written
        await turns(3)
        assert pipe.written.startswith(b"HTTP/1.1 400 ")
