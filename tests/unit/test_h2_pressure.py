"""Clients of the `h2` edge that are slow, stingy with windows or in a hurry: others notice nothing, nothing is lost."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from hyperframe.frame import DataFrame, HeadersFrame, PingFrame, SettingsFrame

from router.errors import ClientTooSlow
from router.ingress.h2_connection import Connection
from router.ingress.h2_frames import PREFACE
from router.types import Request, Sink
from tests.unit.grpc_serving import Served, hangs, message, receipt, says, serving, until, within
from tests.unit.h2_peer import BODY, HEADERS, Peer, framed, peer
from tests.unit.test_h2_hostile import CALM, calls, connections, sweep
from tests.unit.test_h2_parts import FakeTransport, Rig
from tests.unit.test_h2_wire import edge_of, texts

pytestmark = pytest.mark.timeout(60)
WATCH = [(name, "/grpc.health.v1.Health/Watch" if name == ":path" else value) for name, value in HEADERS]


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
        connection, transport = Connection(edge_of(served), asyncio.get_running_loop()), FakeTransport()
        connection.connection_made(transport)
        connection.data_received(PREFACE + SettingsFrame(0).serialize() + PingFrame(0, bytes(8)).serialize())
        await asyncio.sleep(0)
        sent = b"".join(transport.written)
        connection.connection_lost(None)
        assert sent[3] == 4


async def test_watches_that_nobody_reads_hold_up_neither_readiness_nor_the_stop() -> None:
    async with serving(says("a")) as served, peer(served, settings={4: 0}) as client:
        for stream in range(1, 21, 2):
            client.call(stream, framed(b""), headers=WATCH)
        await client.echo()
        await asyncio.wait_for(served.ingress.set_ready(True), 2)
        await asyncio.wait_for(served.ingress.stop(0.1), 5)


@pytest.mark.parametrize("path", ["/grpc.health.v1.Health/Check", "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"])
async def test_a_standing_call_of_a_standard_service_holds_no_last_call_up(path: str) -> None:
    headers = [(name, path if name == ":path" else value) for name, value in HEADERS]
    async with serving(says("a")) as served, peer(served) as client:
        client.call(1, None, end=False, headers=headers)
        await client.echo()
        leaving = asyncio.create_task(served.ingress.last_call())
        try:
            async with asyncio.timeout(5):
                print((await client.answer(1)))
        finally:
            leaving.cancel()


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
    headers = [(name, "/grpc.health.v1.Health/Check" if name == ":path" else value) for name, value in HEADERS]
    async with serving(says("a")) as served, peer(served) as client:
        client.call(1, framed(b"\xff\xff\xff"), headers=headers)
        print((await client.answer(1)).status)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
