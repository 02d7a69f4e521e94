"""Ends of streams and connections of the `h2` edge, asked frame by frame: by whom, in what order, and what is left."""

from __future__ import annotations

import asyncio
import gc

import grpc
import pytest
from hyperframe.frame import GoAwayFrame

from router.errors import ModelNotFound
from router.ingress.h2_call import H2Call
from router.ingress.h2_output import Output
from router.types import Request, Sink
from tests.unit.grpc_serving import edge_of, fails, hangs, message, says, serving, until, within
from tests.unit.h2_peer import BODY, HEADERS, Peer, peer, texts

pytestmark = pytest.mark.timeout(60)


async def test_a_reset_cancels_the_request_and_frees_the_stream() -> None:
    async with serving(hangs("a")) as served, peer(served) as client:
        client.call(1)
        await client.some(1, 10)
        client.reset(1)
        await within(served.dispatch.cancelled.wait())
        (connection,) = edge_of(served)._connections
        assert not connection.calls
        assert not connection._judge.streams
        client.open_window(1, 10)  # Late frames of it are no fault.
        client.reset(1)
        client.data(1, b"late")
        await client.echo()


async def test_a_call_that_ends_before_its_request_asks_the_client_to_stop_sending() -> None:
    async with serving(fails(ModelNotFound("no"))) as served, peer(served) as client:
        client.call(1, BODY, end=False)
        answer = await client.answer(1)
        assert answer.status == 5
        await client.read()
        assert answer.reset == 0


async def test_a_deadline_that_nobody_keeps_ends_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(hangs("a")) as served, peer(served) as client:
        client.call(1, headers=[*HEADERS, ("grpc-timeout", "50m")])
        answer = await client.answer(1)
        assert answer.status == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
        assert texts(answer.data) == ["", "a"]
        await within(served.dispatch.cancelled.wait())


async def test_a_deadline_in_the_middle_of_a_message_resets_the_stream() -> None:
    async with serving(hangs("x" * 5000)) as served, peer(served, settings={4: 1000}) as client:
        client.call(1, headers=[*HEADERS, ("grpc-timeout", "50m")])
        assert (await client.answer(1)).reset == 8
        await within(served.dispatch.cancelled.wait())


async def test_a_client_that_goes_away_finishes_what_it_has_asked() -> None:
    go_on = asyncio.Event()

    async def script(request: Request, sink: Sink) -> None:
        sink.data(message("a"), 1)
        await go_on.wait()
        sink.data(message("b"), 1)

    async with serving(script) as served, peer(served) as client:
        client.call(1)
        await client.some(1, 5)
        client.send(GoAwayFrame(0))
        await client.echo()
        go_on.set()
        assert texts((await client.answer(1)).data) == ["a", "b"]
        assert await client.end() is None


async def test_stop_says_goodbye_refuses_new_calls_and_finishes_the_old() -> None:
    go_on = asyncio.Event()

    async def script(request: Request, sink: Sink) -> None:
        sink.data(message("a"), 1)
        await go_on.wait()
        sink.data(message("b"), 1)

    async with serving(script) as served, peer(served) as client:
        client.call(1)
        await client.some(1, 5)
        stopping = asyncio.create_task(served.ingress.stop(60))
        while client.goaway is None:
            await client.read()
        assert (client.goaway.error_code, client.goaway.last_stream_id) == (0, 1)
        client.call(3)
        assert (await client.answer(3)).reset == 7
        go_on.set()
        assert texts((await client.answer(1)).data) == ["a", "b"]
        assert await client.end() == 0
        await client.close()
        await within(stopping)


async def test_streams_beyond_the_limit_are_refused_one_by_one() -> None:
    async with serving(hangs("a"), max_concurrent_streams=2) as served, peer(served) as client:
        assert client.settings[3] == 2
        for stream in (1, 3, 5):
            client.call(stream)
        assert (await client.answer(5)).reset == 7
        client.reset(1)
        client.call(7)
        await client.some(7, 10)
        assert 3 not in client.ended


async def test_connections_beyond_the_limit_are_closed() -> None:
    async with serving(says("a"), max_connections=1) as served, peer(served) as client:
        async with peer(served, settle=False) as other:
            assert await other.end() is None
        client.call(1)
        assert (await client.answer(1)).status == 0


async def test_data_after_the_end_of_a_request_resets_its_stream() -> None:
    async with serving(hangs("a")) as served, peer(served) as client:
        client.call(1)
        await client.some(1, 10)
        client.data(1, b"more")
        assert (await client.answer(1)).reset == 5
        await within(served.dispatch.cancelled.wait())
        await client.echo()


async def test_ended_calls_leave_nothing_to_the_garbage_collector() -> None:
    async with serving(says("a")) as served, peer(served) as client:
        await client.echo()
        gc.collect()
        gc.disable()
        try:
            for number in range(20):
                client.call(4 * number + 1)
                await client.answer(4 * number + 1)
                served.dispatch.script = hangs("a")
                client.call(4 * number + 3)
                await client.some(4 * number + 3, 10)
                client.reset(4 * number + 3)
                served.dispatch.script = says("a")
            await until(lambda: not edge_of(served)._tasks)
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            assert not [each for each in gc.garbage if isinstance(each, H2Call | Output | asyncio.Task)]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()


async def _many(client: Peer, count: int) -> None:
    for stream in range(1, 2 * count, 2):
        client.call(stream)
    for stream in range(1, 2 * count, 2):
        assert texts((await client.answer(stream)).data) == ["", "a", "b"]


async def test_nothing_is_left_of_calls_that_ended() -> None:
    async with serving(says("a", "b")) as served, peer(served) as client:
        await _many(client, 300)
        (connection,) = edge_of(served)._connections
        assert not connection.calls
        assert not connection._judge.streams
        assert len(connection._judge._closed_streams) <= 256
        assert connection._held == 0
        await until(lambda: not edge_of(served)._tasks)
