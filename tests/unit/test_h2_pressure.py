"""Clients of the `h2` edge that are slow, stingy with windows or in a hurry: others notice nothing, nothing is lost."""

from __future__ import annotations

import asyncio
import itertools
import socket
import ssl
from pathlib import Path

import grpc
import pytest
from h2.events import RequestReceived
from hpack import Encoder
from hyperframe.frame import (
    DataFrame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)
from hypothesis import event as event_
from hypothesis import given, settings
from hypothesis import strategies as st

from router.errors import ClientTooSlow
from router.ingress import h2_connection, h2_frames, h2_intake, h2_wire
from router.ingress.h2_connection import Connection
from router.ingress.h2_edge import CALLS_PER_TURN
from router.ingress.h2_frames import END_HEADERS, PREFACE, headers_frame
from router.ingress.h2_headers import Head, read_head
from router.ingress.h2_judge import Judge
from router.ingress.h2_output import SHARE_BYTES
from router.types import Request, Sink
from tests.unit.grpc_serving import edge_of, hangs, says, serving, until, within
from tests.unit.h2_peer import BODY, HEADERS, Peer, framed, peer, texts
from tests.unit.test_grpc_lifecycle import pems as pems
from tests.unit.test_h2_hostile import CALM, calls, connections, sweep
from tests.unit.test_h2_parts import FakeTransport, Rig

WANTED = frozenset({b"x-session-id", b"traceparent"})
pytestmark = pytest.mark.timeout(60)


def at(path: str) -> list[tuple[str, str]]:
    """The usual headers for another method."""
    return [(name, path if name == ":path" else value) for name, value in HEADERS]


async def test_a_window_that_shrinks_below_nothing_while_its_stream_waits_for_the_connection() -> None:
    async with serving(says("x" * 100_000)) as served, peer(served, settings={4: 70_000}) as client:
        client.call(1)
        await client.some(1, 65_535)
        client.send(SettingsFrame(0, settings={4: 1_000}))
        await client.echo()
        client.open_window(0, 1 << 20)
        await client.echo()
        assert len(client.answers[1].data) == 65_535
        client.open_window(1, 200_000)
        assert texts((await client.answer(1)).data) == ["", "x" * 100_000]


async def test_a_client_may_ping_as_often_as_it_gets_the_rest_of_a_large_message() -> None:
    async with serving(says("x" * 500_000)) as served, peer(served, settings={4: 1 << 20}) as client:
        client.call(1)
        for _ in range(7):
            before = len(client.answers[1].data) if 1 in client.answers else 0
            await client.some(1, before + 65_535)
            await client.echo()
            client.open_window(0, 65_535)
        await client.answer(1)
        assert client.goaway is None


async def test_our_settings_come_first_even_where_a_client_speaks_within_the_handshake() -> None:
    async with serving(says("a")) as served:
        loop = asyncio.get_running_loop()
        connection, transport = Connection(edge_of(served), loop), FakeTransport()
        connection.connection_made(transport)
        connection.data_received(PREFACE + SettingsFrame(0).serialize() + PingFrame(0, bytes(8)).serialize())
        await asyncio.sleep(0)
        sent = b"".join(transport.written)
        connection.connection_lost(None)
        assert sent[3] == 4


async def test_watches_that_nobody_reads_hold_up_neither_readiness_nor_the_stop() -> None:
    async with serving(says("a")) as served, peer(served, settings={4: 0}) as client:
        for stream in range(1, 21, 2):
            client.call(stream, framed(b""), headers=at("/grpc.health.v1.Health/Watch"))
        await client.echo()
        await within(served.ingress.set_ready(True), 2)
        await within(served.ingress.stop(600), 5)


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/grpc.health.v1.Health/Check", grpc.StatusCode.DEADLINE_EXCEEDED),
        ("/grpc.health.v1.Health/Watch", grpc.StatusCode.DEADLINE_EXCEEDED),
        ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", grpc.StatusCode.UNAVAILABLE),
    ],
)
async def test_a_call_of_a_standard_service_that_asks_nothing_holds_no_last_call_up(
    path: str, code: grpc.StatusCode
) -> None:
    async with serving(says("a"), request_timeout_s=0.05) as served, peer(served) as client:
        client.call(1, None, end=False, headers=at(path))
        await client.echo()
        leaving = asyncio.create_task(served.ingress.last_call())
        assert (await client.answer(1)).status == code.value[0]
        assert await client.end() == 0
        await client.close()
        await within(leaving)


@pytest.mark.slow
async def test_resets_of_streams_that_are_over_are_no_flood() -> None:
    """Some clients reset each stream once they have its status."""
    async with serving(says("a")) as served, peer(served) as client:
        client.open_window(0, 1 << 24)
        for number in range(2000):
            client.call(2 * number + 1)
            await client.answer(2 * number + 1)
            client.reset(2 * number + 1)
        await client.echo()
        assert client.goaway is None


async def test_garbage_for_a_standard_service_is_the_clients_fault(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(says("a")) as served, peer(served) as client:
        client.call(1, framed(b"\xff\xff\xff"), headers=at("/grpc.health.v1.Health/Check"))
        assert (await client.answer(1)).status == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


# -- work that is bounded


class Counting(FakeTransport):
    """A transport that tells whether it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.reading = True

    def pause_reading(self) -> None:
        assert self.reading
        self.reading = False

    def resume_reading(self) -> None:
        assert not self.reading
        self.reading = True


async def test_a_read_of_many_frames_is_worked_off_in_many_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(h2_intake, "TURN_S", -1.0)  # One frame each.
    async with serving(says("a")) as served:
        connection, transport = Connection(edge_of(served), asyncio.get_running_loop()), Counting()
        connection.connection_made(transport)
        pings = b"".join(PingFrame(0, bytes([number] * 8), flags=["ACK"]).serialize() for number in range(20))
        connection.data_received(PREFACE + SettingsFrame(0).serialize() + pings + WindowUpdateFrame(0, 9).serialize())
        window, turns = connection.wire.window, 0
        while not transport.reading:
            turns += 1
            await asyncio.sleep(0)
        connection.connection_lost(None)
        assert turns == 22
        assert connection.wire.window == window + 9


async def test_a_connection_that_is_lost_between_two_turns_does_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(h2_intake, "TURN_S", -1.0)
    async with serving(says("a")) as served:
        connection, transport = Connection(edge_of(served), asyncio.get_running_loop()), Counting()
        connection.connection_made(transport)
        block = Encoder().encode(list(HEADERS))
        call = HeadersFrame(1, block, flags=["END_HEADERS"]).serialize() + DataFrame(1, BODY).serialize()
        connection.data_received(PREFACE + SettingsFrame(0).serialize() + call)
        connection.connection_lost(None)
        for _ in range(5):
            await asyncio.sleep(0)
        assert not connection.calls
        assert not served.dispatch.requests


class Taken(Counting):
    """Whose client takes all at once."""

    def get_write_buffer_size(self) -> int:
        return 0


def crowd(number: int) -> bytes:
    """What a client sends that makes so many calls at once."""
    encoder = Encoder()
    calls = (
        HeadersFrame(stream, encoder.encode(list(HEADERS)), flags=["END_HEADERS"]).serialize()
        + DataFrame(stream, BODY, flags=["END_STREAM"]).serialize()
        for stream in range(1, 2 * number, 2)
    )
    return PREFACE + SettingsFrame(0).serialize() + b"".join(calls)


def trailers(data: bytes) -> int:
    """How many streams end with headers in there."""
    found = 0
    while data:
        length, kind, flags = int.from_bytes(data[:3], "big"), data[3], data[4]
        found += kind == h2_frames.HEADERS and bool(flags & h2_frames.END_STREAM)
        data = data[9 + length :]
    return found


async def test_few_calls_of_a_crowd_begin_in_one_turn_on_all_connections_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(h2_intake, "TURN_S", 60.0)
    async with serving(says("a")) as served:
        loop, begun, seen = asyncio.get_running_loop(), served.dispatch.requests, [0]
        clients = [(Connection(edge_of(served), loop), Taken()) for _ in range(3)]
        for connection, transport in clients:
            connection.connection_made(transport)
            connection.data_received(crowd(30))
        try:
            while any(not transport.reading for _, transport in clients):
                begun_by = [(connection._judge.highest_inbound_stream_id + 1) // 2 for connection, _ in clients]
                assert max(begun_by) - min(begun_by) <= CALLS_PER_TURN + 1  # The first had a turn to itself.
                await asyncio.sleep(0)
                seen.append(len(begun))
            await until(lambda: not any(connection.calls for connection, _ in clients))
            assert max(after - before for before, after in itertools.pairwise(seen)) <= CALLS_PER_TURN
            assert [trailers(b"".join(transport.written)) for _, transport in clients] == [30, 30, 30]
        finally:
            for connection, _ in clients:
                connection.connection_lost(None)


async def test_few_calls_of_a_lost_connection_are_given_up_in_one_turn() -> None:
    async with serving(hangs("a")) as served:
        dispatch, loop, ended = served.dispatch, asyncio.get_running_loop(), list[str]()
        script = dispatch.script

        async def told(request: Request, sink: Sink) -> None:
            try:
                await script(request, sink)
            finally:
                ended.append(request.request_id)

        dispatch.script = told
        connection = Connection(edge_of(served), loop)
        connection.connection_made(Taken())
        connection.data_received(crowd(60))
        await until(lambda: len(dispatch.requests) == 60)
        await asyncio.sleep(0.01)
        connection.connection_lost(None)
        seen = [0]
        while len(ended) < 60:
            await asyncio.sleep(0)
            seen.append(len(ended))
        assert max(after - before for before, after in itertools.pairwise(seen)) <= CALLS_PER_TURN
        await until(lambda: not edge_of(served)._tasks)


async def test_a_connection_that_is_lost_before_its_calls_turn_begins_none_and_holds_up_nobody() -> None:
    async with serving(says("a")) as served:
        loop = asyncio.get_running_loop()
        first, lost, last = (Connection(edge_of(served), loop) for _ in range(3))
        for connection in (first, lost, last):
            connection.connection_made(Taken())
            connection.data_received(crowd(CALLS_PER_TURN))
        lost.connection_lost(None)
        await until(lambda: len(served.dispatch.requests) == 2 * CALLS_PER_TURN)
        await until(lambda: not last.calls)
        for connection in (first, last):
            connection.connection_lost(None)


async def test_calls_that_are_reset_in_the_very_read_that_made_them_are_nobodys_fault() -> None:
    async with serving(says("a")) as served:
        loop = asyncio.get_running_loop()
        clients = [Connection(edge_of(served), loop) for _ in range(20)]
        for client in clients:
            client.connection_made(Taken())
            resets = b"".join(RstStreamFrame(stream, 8).serialize() for stream in (1, 3))
            client.data_received(crowd(2) + resets)
        try:
            await until(lambda: all(client._judge.highest_inbound_stream_id == 3 for client in clients))
            await until(lambda: not edge_of(served)._tasks)
            assert not served.refused
        finally:
            for client in clients:
                client.connection_lost(None)


async def test_calls_are_served_whatever_a_turn_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(h2_intake, "TURN_S", -1.0)
    monkeypatch.setattr(h2_wire, "TURN_S", -1.0)
    async with serving(says("x" * 40_000, "y")) as served, peer(served, settings={4: 1 << 20}) as client:
        client.open_window(0, 1 << 24)
        for stream in range(1, 61, 2):
            client.call(stream)
        for stream in range(1, 61, 2):
            assert texts((await client.answer(stream)).data) == ["", "x" * 40_000, "y"]
        client.send(b"\0\0\4\x08\0\0\0\0\0\0\0\0\0", PingFrame(0, bytes(8)))
        assert await client.end() == 1


@pytest.mark.parametrize("stream", [0, 1])
async def test_windows_that_open_byte_by_byte_end_their_connection(stream: int) -> None:
    async with serving(says("x" * 100_000)) as served, peer(served, settings={4: 65_535 - stream}) as client:
        client.call(1)
        await client.some(1, 65_535 - stream)
        client.open_window(1 - stream, 1 << 20)
        with pytest.raises(EOFError):
            await one_by_one(client, stream)
        assert await client.end() == CALM


async def one_by_one(client: Peer, stream: int) -> None:
    for number in range(1_500):
        client.open_window(stream, 1)
        await client.some(1, 65_536 - stream + number)


async def test_small_windows_that_open_in_time_are_no_flood() -> None:
    async with serving(says("x" * 400_000)) as served, peer(served, settings={4: 256}) as client:
        client.call(1)
        client.open_window(0, 1 << 20)
        for number in range(1_560):
            await client.some(1, 256 * (number + 1))
            client.open_window(1, 256)
        client.open_window(1, 1 << 20)
        assert (await client.answer(1)).status == 0


# -- memory that is bounded


async def test_a_connection_that_leaves_too_much_unread_keeps_a_share_for_each_of_its_streams() -> None:
    rig = Rig(window=0)
    rig.wire._max_unread_bytes = 300_000
    greedy, modest = rig.output(1), rig.output(3)
    for _ in range(4):
        greedy.send(bytes(80_000))
    with pytest.raises(ClientTooSlow):
        greedy.send(b"")
    modest.send(bytes(SHARE_BYTES))
    with pytest.raises(ClientTooSlow):
        modest.send(b"")
    greedy.drop()
    modest.send(b"")
    assert rig.wire.unread_bytes == greedy.unread_bytes + modest.unread_bytes == SHARE_BYTES + 10
    modest.kill()
    assert rig.wire.unread_bytes == 0


async def test_what_a_connection_leaves_unread_is_forgotten_with_its_streams() -> None:
    async with serving(hangs("x" * 50_000)) as served, peer(served, settings={4: 100}) as client:
        for stream in (1, 3, 5):
            client.call(stream)
            await client.some(stream, 100)
        (connection,) = connections(served)
        assert connection.wire.unread_bytes == sum(call.output.unread_bytes for call in calls(served)) > 100_000
        for stream in (1, 3, 5):
            client.reset(stream)
        await client.echo()
        assert connection.wire.unread_bytes == 0


# -- ends that lose nothing


@pytest.mark.parametrize("goodbye", ["stop", "goaway"])
async def test_a_slow_client_gets_all_of_the_last_answer(goodbye: str) -> None:
    """Its window updates come when we have said all: a socket closed by then would reset the connection."""
    async with serving(says("x" * 2_000_000), stream_buffer_bytes=8 << 20) as served:
        host, _, port = served.target.rpartition(":")
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
            sock.connect((host, int(port)))
            sock.setblocking(False)
            reader, writer = await asyncio.open_connection(sock=sock, limit=16_384)
            client = Peer(reader, writer)
            client.settle({4: 1 << 26})
            client.open_window(0, 1 << 26)
            client.call(1)
            await client.some(1, 1)
            await until(lambda: not served.ingress._service.calls)
            (connection,) = connections(served)
            stopping = asyncio.create_task(served.ingress.stop(60) if goodbye == "stop" else asyncio.sleep(0))
            if goodbye == "goaway":
                client.send(GoAwayFrame(0))
            await until(lambda: connection._closing)
            while 1 not in client.ended:
                frame = await client.read()
                client.open_window(0, len(frame.serialize()))
            assert len(client.answers[1].data) > 2_000_000
            assert client.answers[1].status == 0
            await client.close()
            await within(stopping)


async def test_a_client_that_does_not_close_is_closed_in_time() -> None:
    async with serving(says("a")) as served, peer(served) as client:
        client.call(1)
        await client.answer(1)
        client.send(GoAwayFrame(0))
        await until(lambda: all(connection._closing for connection in connections(served)))
        sweep(served, h2_connection.CLOSE_S + 1)
        await until(lambda: not connections(served))


async def test_a_stop_over_tls_loses_nothing_and_waits_for_no_client_that_says_no_more(pems: Path) -> None:
    files = {"tls_cert_file": str(pems / "server.pem"), "tls_key_file": str(pems / "server.key")}
    context = ssl.create_default_context(cafile=str(pems / "server.pem"))
    context.set_alpn_protocols(["h2"])
    async with (
        serving(says("x" * 500_000), stream_buffer_bytes=8 << 20, **files) as served,
        peer(served, settings={4: 1 << 24}, tls=context) as client,
    ):
        client.open_window(0, 1 << 24)
        client.call(1)
        await client.some(1, 1)
        await until(lambda: not served.ingress._service.calls)
        (connection,) = connections(served)
        stopping = asyncio.create_task(served.ingress.stop(60))
        await until(lambda: connection._closing)
        client.open_window(0, 1)
        assert texts((await client.answer(1)).data) == ["", "x" * 500_000]
        connection.sweep(asyncio.get_running_loop().time() + h2_connection.TLS_CLOSE_S + 0.1)
        assert await client.end() == 0
        await within(stopping)


# -- header blocks in the bytes of earlier ones

extras = st.sampled_from(
    [
        (),
        (("x-session-id", "a"),),
        (("x-session-id", "b"),),
        (("x-session-id", "a"), ("traceparent", "t"), ("other", "o" * 40)),
        (("traceparent", "t" * 60),),
    ]
)
sizes = st.one_of(*[st.none()] * 9, st.sampled_from([0, 60, 120, 200, 4096]))
one_in_eight = st.sampled_from([False] * 7 + [True])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(extras, sizes, one_in_eight), min_size=10, max_size=40))
def test_a_block_that_came_before_says_what_it_would_say_anew(
    steps: list[tuple[tuple[tuple[str, str], ...], int | None, bool]],
) -> None:
    """With a table that changes its size, loses entries, and is written to by trailers."""
    judge, encoder, seen = Judge(100), Encoder(), 0
    for number, (extra, size, with_trailers) in enumerate(steps):
        stream = 2 * number + 1
        if size is not None:
            encoder.header_table_size = size
        block = encoder.encode([*HEADERS, *extra])
        head = judge.reopened(stream, END_HEADERS, block)
        expected = read_head([(name.encode(), value.encode()) for name, value in [*HEADERS, *extra]], WANTED)
        assert isinstance(expected, Head)
        if head is None:
            judge.read(block)
            (event,) = judge.receive_data(headers_frame(stream, block, end_stream=False))
            assert isinstance(event, RequestReceived)
            assert event.headers is not None
            assert read_head(event.headers, WANTED) == expected
            judge.remember(stream, block, expected)
        else:
            seen += 1
            assert head == expected
        if with_trailers:
            trailers = encoder.encode([("other", "end"), *extra])
            judge.read(trailers)
            judge.receive_data(headers_frame(stream, trailers, end_stream=True))
        judge.forget(stream)
    event_(f"short ways: {min(seen, 3)}")
