"""Flow control of the `h2` edge, asked frame by frame: what windows let pass and hold back, and which are refused."""

from __future__ import annotations

import asyncio

import pytest
from hyperframe.frame import DataFrame, SettingsFrame

from router.errors import ModelNotFound
from router.types import Request, Sink
from tests.unit.grpc_serving import Served, edge_of, fails, hangs, message, receipt, says, serving, until, within
from tests.unit.h2_peer import BODY, peer, texts

pytestmark = pytest.mark.timeout(60)


async def test_a_window_of_a_few_bytes_lets_a_few_bytes_pass() -> None:
    async with serving(says("abcdef" * 100)) as served, peer(served, settings={4: 10}) as client:
        client.call(1)
        assert len(await client.some(1, 10)) == 10
        await client.echo()
        assert len(client.answers[1].data) == 10
        client.open_window(1, 7)
        assert len(await client.some(1, 17)) == 17
        client.open_window(1, 10_000)
        assert texts((await client.answer(1)).data) == ["", "abcdef" * 100]


async def test_messages_that_wait_leave_in_one_frame() -> None:
    words = [f"word {number}" for number in range(100)]
    async with serving(says(*words)) as served, peer(served, settings={4: 0}) as client:
        client.call(1)
        await until(lambda: unread_bytes(served) > sum(len(message(word)) + 5 for word in words))
        client.open_window(1, 60_000)
        answer = await client.answer(1)
        assert texts(answer.data) == ["", *words]
        assert answer.frames == 1


def unread_bytes(served: Served) -> int:
    """What waits for clients, all streams together."""
    return sum(
        call.output.unread_bytes for connection in edge_of(served)._connections for call in connection.calls.values()
    )


async def test_a_stalled_stream_delays_no_other() -> None:
    async with serving(says("x" * 5000)) as served, peer(served, settings={4: 100}) as client:
        client.call(1)
        await client.some(1, 100)
        client.send(SettingsFrame(0, settings={4: 10_000}))  # Opens all streams' windows…
        await client.answer(1)
        client.send(SettingsFrame(0, settings={4: 0}))
        client.call(3)
        client.call(5)
        client.open_window(5, 10_000)  # … and this one's alone.
        assert texts((await client.answer(5)).data) == ["", "x" * 5000]
        assert client.answers.get(3) is None or client.answers[3].data == b""
        client.open_window(3, 10_000)
        assert texts((await client.answer(3)).data) == ["", "x" * 5000]


async def test_a_window_may_become_negative() -> None:
    async with serving(says("x" * 5000)) as served, peer(served, settings={4: 3000}) as client:
        client.call(1)
        await client.some(1, 3000)
        client.send(SettingsFrame(0, settings={4: 1000}))
        client.open_window(1, 2000)  # Now it is at 0.
        await client.echo()
        assert len(client.answers[1].data) == 3000
        client.open_window(1, 5000)
        assert texts((await client.answer(1)).data) == ["", "x" * 5000]


async def test_an_exhausted_connection_window_holds_data_and_nothing_else() -> None:
    async with serving(says("x" * 40_000)) as served, peer(served, settings={4: 1 << 20}) as client:
        for stream in (1, 3):
            client.call(stream)
        async with asyncio.timeout(10):
            while sum(len(answer.data) for answer in client.answers.values()) < 65535:
                await client.read()
        served.dispatch.script = fails(ModelNotFound("gone"))
        client.call(5)
        assert (await client.answer(5)).status == 5  # Headers need no window.
        assert sum(len(answer.data) for answer in client.answers.values()) == 65535
        client.open_window(0, 1 << 20)
        for stream in (1, 3):
            assert texts((await client.answer(stream)).data) == ["", "x" * 40_000]


async def test_streams_that_wait_for_the_connection_take_turns() -> None:
    async with serving(says("x" * 100_000)) as served, peer(served, settings={4: 1 << 20}) as client:
        for stream in (1, 3, 5):
            client.call(stream)
        await client.some(1, 16384)
        await until(lambda: len(served.dispatch.requests) == 3)
        order = []
        client.open_window(0, 1 << 20)
        while len(client.ended) < 3:
            frame = await client.read()
            if isinstance(frame, DataFrame):
                order.append(frame.stream_id)
        assert order[:6].count(1) <= 3
        assert {3, 5} <= set(order[:6])


@pytest.mark.parametrize(("increment", "code"), [(0x7FFFFFFF, 3), (0, 1)])
async def test_a_bad_window_update_resets_its_stream_alone(increment: int, code: int) -> None:
    async with serving(hangs("a")) as served, peer(served) as client:
        client.call(1)
        client.call(3)
        await client.some(1, 10)
        client.send(b"\0\0\4\x08\0" + (1).to_bytes(4, "big") + increment.to_bytes(4, "big"))
        assert (await client.answer(1)).reset == code
        await within(served.dispatch.cancelled.wait())
        await client.echo()
        assert 3 not in client.ended


@pytest.mark.parametrize(("increment", "code"), [(0x7FFFFFFF, 3), (0, 1)])
async def test_a_bad_window_update_of_the_connection_ends_it(increment: int, code: int) -> None:
    async with serving(hangs("a")) as served, peer(served) as client:
        client.send(b"\0\0\4\x08\0\0\0\0\0" + increment.to_bytes(4, "big"))
        assert await client.end() == code


async def test_initial_windows_beyond_their_bounds_end_the_connection() -> None:
    async with serving(hangs("a")) as served, peer(served) as client:
        client.call(1)
        await client.some(1, 10)
        client.open_window(1, 0x7FFFFFFF - 65535)
        client.send(SettingsFrame(0, settings={4: 70_000}))
        assert await client.end() == 3
        await within(served.dispatch.cancelled.wait())


async def test_a_client_that_reads_nothing_costs_a_bounded_buffer_and_its_stream() -> None:
    async def script(request: Request, sink: Sink) -> None:
        sink.routed(receipt(request))
        while True:
            sink.data(message("x" * 60_000), 1)
            await asyncio.sleep(0)

    wide = {4: 0x7FFFFFFF}
    async with serving(script, stream_buffer_bytes=1 << 20) as served, peer(served, settings=wide) as client:
        client.stop_reading()
        client.open_window(0, 0x7FFFFFFF - 65535)
        client.call(1)
        await within(served.dispatch.failed.wait())
        (connection,) = edge_of(served)._connections
        assert connection._transport is not None
        assert connection._transport.get_write_buffer_size() < 1 << 20
        assert sum(call.output.unread_bytes for call in connection.calls.values()) < 1 << 20


async def test_a_client_that_sends_what_nobody_reads_is_stopped_by_its_window() -> None:
    async with serving(hangs("a")) as served, peer(served) as client:
        client.call(1, BODY, end=False)
        await client.some(1, 10)
        for _ in range(30):  # More than the stream's window.
            client.data(1, bytes(16384))
        await client.echo()
        assert client.stream_windows.get(1, 0) == 0
        client.call(3, BODY, end=False)
        await client.some(3, 10)
