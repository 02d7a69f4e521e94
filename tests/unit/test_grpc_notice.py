"""A gRPC ingress that goes away in a while, and one whose stop is hurried."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.unit import grpc_serving
from tests.unit.grpc_serving import PROMPT, generate_on, hangs, says, serving, within
from tests.unit.h2_peer import peer

both_edges = pytest.mark.parametrize("edge", ["h2", "aio"])
NOTICE_S = 60.0


async def text_of(call: Any) -> str:
    return "".join([part.text async for part in call])


@both_edges
async def test_in_a_notice_it_is_unready_and_serves_old_and_new_connections(
    edge: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_serving, "EDGE", edge)
    async with serving(says("a")) as served:
        health: Any = health_pb2_grpc.HealthStub(served.channel)
        await served.ingress.set_ready(True)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
        served.ingress.notice(NOTICE_S)
        await served.ingress.set_ready(True)  # Whatever its replicas.
        answer = await health.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert await within(text_of(served.generate())) == "a"
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(served.target, options=options) as newcomer:
            assert await within(text_of(generate_on(newcomer)(PROMPT))) == "a"


async def test_clients_are_asked_to_leave_half_way_and_what_they_ask_all_the_same_is_served() -> None:
    async with serving(says("a")) as served, peer(served) as client:
        client.call(1)
        assert (await client.answer(1)).status == 0
        assert client.goaway is None
        served.ingress.notice(0.1)
        while client.goaway is None:
            await within(client.read())
        assert client.goaway.last_stream_id == (1 << 31) - 1
        for stream in (3, 5):
            client.call(stream)
            assert (await client.answer(stream)).status == 0
        stopping = asyncio.create_task(served.ingress.stop(NOTICE_S))
        assert await client.end() == 0
        assert client.goaway.last_stream_id == 5
        await client.close()
        await within(stopping)


async def test_those_who_come_in_a_notice_are_asked_too() -> None:
    async with serving(says("a")) as served:
        served.ingress.notice(0.1)
        async with peer(served) as client:
            while client.goaway is None:
                await within(client.read())
            client.call(1)
            assert (await client.answer(1)).status == 0
            await client.close()


@both_edges
async def test_a_second_stop_ends_what_the_first_one_waits_for(edge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_serving, "EDGE", edge)
    async with serving(hangs("a")) as served:
        call = served.generate()
        for _ in ("route", "a"):
            await within(call.read())
        stopping = asyncio.create_task(served.ingress.stop(3600))
        await asyncio.sleep(0)
        await within(served.ingress.stop(0))
        assert await within(call.code()) is grpc.StatusCode.UNAVAILABLE
        await within(stopping)
