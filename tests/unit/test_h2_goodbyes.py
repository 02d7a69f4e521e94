"""Goodbyes of the `h2` edge: a client that is sent away can read why, in bounded time, memory and numbers."""

from __future__ import annotations

import asyncio
import socket
import ssl
from pathlib import Path
from typing import Any

import pytest
from hyperframe.frame import ContinuationFrame, GoAwayFrame, PingFrame, SettingsFrame

from router.ingress.h2_connection import GOODBYE_S, TLS_CLOSE_S, UNHEARD_BYTES, Connection
from router.ingress.h2_frames import PREFACE
from tests.unit.grpc_serving import Served, edge_of, hangs, says, serving, until
from tests.unit.h2_peer import peer
from tests.unit.test_grpc_lifecycle import pems as pems
from tests.unit.test_h2_hostile import FRAME_SIZE_ERROR, connections, sweep
from tests.unit.test_h2_parts import FakeTransport

pytestmark = pytest.mark.timeout(60)

BROKEN = b"\xff\xff\xff\x00\x00\x00\x00\x00\x01"
"""The head of a frame that is too long."""


def tls_of(pems: Path) -> tuple[dict[str, Any], ssl.SSLContext]:
    """What the server needs, and the client."""
    context = ssl.create_default_context(cafile=str(pems / "server.pem"))
    context.set_alpn_protocols(["h2"])
    return {"tls_cert_file": str(pems / "server.pem"), "tls_key_file": str(pems / "server.key")}, context


async def closing(served: Served, count: int = 1) -> None:
    """Until so many connections have had their last words."""
    await until(lambda: sum(connection._closing for connection in connections(served)) == count)


async def test_a_client_that_goes_on_sending_reads_why_it_is_sent_away() -> None:
    async with serving(says("a")) as served, peer(served) as client:
        client.stop_reading()
        client.send(BROKEN)
        await closing(served)
        for _ in range(20):
            client.send(ContinuationFrame(1, bytes(16384)))
            await client.drain()
            await asyncio.sleep(0.001)
        client.go_on_reading()
        assert await client.end() == FRAME_SIZE_ERROR
        await until(lambda: not connections(served))


async def test_a_client_that_was_sent_away_and_does_not_close_is_closed_in_time() -> None:
    async with serving(says("a")) as served, peer(served) as client:
        client.send(BROKEN)
        await closing(served)
        for _ in range(3):
            client.send(PingFrame(0, opaque_data=bytes(8)))
            await asyncio.sleep(0.01)
        (connection,) = connections(served)
        connection.sweep(asyncio.get_running_loop().time() + GOODBYE_S - 1)
        assert connections(served)
        connection.sweep(asyncio.get_running_loop().time() + GOODBYE_S)
        await until(lambda: not connections(served))


@pytest.mark.parametrize("before", ["retired", "goaway"])
async def test_a_draining_client_that_breaks_the_protocol_has_no_longer_than_others(before: str) -> None:
    """Its call ends with the connection, and ends no connection at leisure then."""
    async with serving(hangs("a")) as served, peer(served) as client:
        client.call(1)
        await client.some(1, 5)
        if before == "retired":
            for connection in connections(served):
                connection.retire()
        else:
            client.send(GoAwayFrame(0))
        await client.echo()
        client.send(BROKEN)
        await closing(served)
        (connection,) = connections(served)
        assert connection._transport is not None
        sweep(served, GOODBYE_S - 1)
        assert not connection._transport.is_closing()
        sweep(served, GOODBYE_S + 0.1)
        assert connection._transport.is_closing()


async def test_no_goaway_names_a_higher_stream_than_one_before() -> None:
    """The client may have made that call again elsewhere."""
    async with serving(hangs("a")) as served, peer(served) as client:
        client.call(1)
        await client.some(1, 5)
        (connection,) = connections(served)
        connection.retire()
        client.call(3)
        assert (await client.answer(3)).reset == 7
        assert client.goaway is not None
        assert client.goaway.last_stream_id == 1
        connection.last_call()
        await client.echo()
        assert client.goaway.last_stream_id == 1
        client.send(BROKEN)
        assert await client.end() == FRAME_SIZE_ERROR
        assert client.goaway.last_stream_id == 1


# -- over TLS


def read_to_the_end(sock: ssl.SSLSocket) -> bytes:
    """Raises where the end is none of TLS's."""
    found = b""
    while data := sock.recv(65_536):
        found += data
    return found


@pytest.mark.parametrize("why", ["broken", "retired"])
async def test_over_tls_the_end_is_said_and_is_no_truncation(why: str, pems: Path) -> None:
    files, context = tls_of(pems)
    async with serving(says("a"), **files) as served:
        host, _, port = served.target.rpartition(":")

        def connect() -> ssl.SSLSocket:
            plain = socket.create_connection((host, int(port)), timeout=10)
            sock = context.wrap_socket(plain, server_hostname="localhost", suppress_ragged_eofs=False)
            sock.sendall(PREFACE + SettingsFrame(0).serialize() + (BROKEN if why == "broken" else b""))
            return sock

        with await asyncio.to_thread(connect) as sock:
            await until(lambda: any(connection._intake.ready for connection in connections(served)))
            if why == "retired":
                for connection in connections(served):
                    connection.retire()
            await closing(served)
            sweep(served, GOODBYE_S + 0.1)
            sent = await asyncio.to_thread(read_to_the_end, sock)
            assert (b"a frame of" in sent) == (why == "broken")
        await until(lambda: not connections(served))


class OverTls(FakeTransport):
    """A transport whose client never answers TLS's end."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = False
        self.reading = True

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed or self.aborted

    def pause_reading(self) -> None:
        assert self.reading
        self.reading = False

    def resume_reading(self) -> None:
        raise AssertionError


async def sent_away(served: Served) -> tuple[Connection, OverTls]:
    """A connection whose client broke the protocol."""
    connection, transport = Connection(edge_of(served), asyncio.get_running_loop()), OverTls()
    connection.connection_made(transport)
    connection.data_received(PREFACE + SettingsFrame(0).serialize() + BROKEN)
    assert connection._closing
    return connection, transport


async def test_a_client_that_does_not_answer_the_end_over_tls_is_dropped_by_the_next_sweep() -> None:
    async with serving(says("a")) as served:
        connection, transport = await sent_away(served)
        late = asyncio.get_running_loop().time() + TLS_CLOSE_S + 0.1
        connection.sweep(late)
        assert transport.closed
        connection.data_received(b"more")  # Which wins it no time.
        assert not transport.aborted
        connection.sweep(late + 0.5)
        assert transport.aborted
        connection.connection_lost(None)


# -- bounds


async def test_no_more_than_a_bounded_part_is_read_of_a_client_that_was_sent_away() -> None:
    async with serving(says("a")) as served:
        connection, transport = await sent_away(served)
        for _ in range(UNHEARD_BYTES >> 16):
            connection.data_received(bytes(1 << 16))
        assert transport.reading
        connection.data_received(b"x")
        assert not transport.reading
        connection.data_received(bytes(1 << 16))  # TLS may have had it in hand.
        late = asyncio.get_running_loop().time() + GOODBYE_S + 0.1
        connection.sweep(late)
        connection.sweep(late + 0.5)
        assert transport.aborted
        connection.connection_lost(None)


async def test_a_client_that_sends_without_end_is_stopped_and_closed_in_time() -> None:
    async with serving(says("a")) as served, peer(served) as client:
        client.send(BROKEN)
        await closing(served)
        (connection,) = connections(served)
        while connection._unheard_bytes <= UNHEARD_BYTES:
            client.send(bytes(1 << 18))
            await asyncio.sleep(0)
        seen = connection._unheard_bytes
        for _ in range(50):
            client.send(bytes(1 << 18))
            await asyncio.sleep(0)
        assert connection._unheard_bytes == seen
        sweep(served, GOODBYE_S + 0.1)
        await until(lambda: not connections(served))


@pytest.mark.parametrize("kind", ["plain", "tls"])
async def test_clients_that_were_sent_away_go_first_where_there_are_too_many(kind: str, pems: Path) -> None:
    files, context = tls_of(pems) if kind == "tls" else ({}, None)
    async with (
        serving(hangs("a"), max_connections=2, **files) as served,
        peer(served, tls=context) as first,
        peer(served, tls=context) as broken,
    ):
        first.call(1)
        await first.some(1, 5)
        broken.send(BROKEN)
        await closing(served)
        async with peer(served, tls=context) as second:
            second.call(1)
            await second.some(1, 5)
            await first.echo()
            assert len(connections(served)) == 2
            with pytest.raises((EOFError, ConnectionError)):  # Nobody is there who could go.
                async with peer(served, tls=context) as third:
                    await third.echo()
            await second.echo()
            second.send(BROKEN)
            await closing(served)
        await until(lambda: len(connections(served)) == 1)
        assert not edge_of(served)._reception.make_room()
        await first.echo()


async def test_whoever_leaves_in_peace_is_not_dropped_for_another() -> None:
    """It may have its last answer still to read."""
    async with serving(says("a"), max_connections=1) as served, peer(served) as client:
        client.call(1)
        await client.answer(1)
        client.send(GoAwayFrame(0))
        await closing(served)
        async with peer(served, settle=False) as other:
            assert await other.end() is None
        assert len(connections(served)) == 1
