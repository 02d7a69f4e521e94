"""A gRPC ingress on sockets that it shares, and how it leaves them to another."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from router.errors import ConfigError
from router.ingress.grpc import GrpcIngress
from router.options import GrpcOptions
from router.types import Request, Sink
from tests.unit import grpc_serving
from tests.unit.grpc_serving import PROMPT, FakeDispatch, FakeFleet, generate_on, message, says, serving
from tests.unit.h2_peer import peer

pytestmark = pytest.mark.slow


@pytest.fixture(params=["h2", "aio"], autouse=True)
def edge(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test holds on both edges."""
    monkeypatch.setattr(grpc_serving, "EDGE", request.param)


async def within(work: Any) -> Any:
    return await asyncio.wait_for(work, 30)


async def text_of(call: Any) -> str:
    return "".join([part.text async for part in call])


async def test_calls_in_flight_end_whole_and_nobody_new_is_accepted() -> None:
    go_on = asyncio.Event()

    async def script(request: Request, sink: Sink) -> None:
        sink.data(message("a"), 1)
        await go_on.wait()
        sink.data(message("b"), 1)

    async with serving(script) as old:
        call = old.generate()
        assert (await within(call.read())).text == "a"
        leaving = asyncio.create_task(old.ingress.last_call())
        await asyncio.sleep(0)
        go_on.set()
        assert (await within(call.read())).text == "b"
        assert await within(call.code()) is grpc.StatusCode.OK
        await within(leaving)
        with pytest.raises(grpc.aio.AioRpcError):
            await within(text_of(old.generate()))


async def test_a_watch_of_the_health_service_does_not_hold_it_up() -> None:
    async with serving(says("a")) as served:
        health: Any = health_pb2_grpc.HealthStub(served.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        await within(watch.read())
        await within(served.ingress.last_call())
        assert await within(watch.code()) is grpc.StatusCode.UNAVAILABLE


async def test_a_stop_shortens_a_last_call() -> None:
    async def forever(request: Request, sink: Sink) -> None:
        sink.data(message("a"), 1)
        await asyncio.Event().wait()

    async with serving(forever) as served:
        call = served.generate()
        await within(call.read())
        leaving = asyncio.create_task(served.ingress.last_call())
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.wait([leaving])
        await within(served.ingress.stop(0))
        assert await within(call.code()) is grpc.StatusCode.UNAVAILABLE


async def test_an_ingress_listens_on_the_sockets_that_it_is_given_and_on_no_others() -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        options = GrpcOptions(port=port, edge=grpc_serving.EDGE)
        ingress = GrpcIngress(options, FakeDispatch(says("a")), FakeFleet(), reuse_port=True)
        await ingress.listen(())
        with socket.socket() as client:
            assert client.connect_ex(("127.0.0.1", port)) != 0
        await ingress.listen([sock])
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            assert await within(text_of(generate_on(channel)(PROMPT))) == "a"
        await ingress.stop(0)


async def test_tls_files_that_cannot_be_used_are_refused_before_anything_listens() -> None:
    options = GrpcOptions(edge=grpc_serving.EDGE, tls_cert_file="/nowhere", tls_key_file="/nowhere")
    with pytest.raises(ConfigError, match=r"grpc\.tls_cert_file: cannot read /nowhere"):
        await GrpcIngress(options, FakeDispatch(says()), FakeFleet(), reuse_port=True).listen(())


async def test_a_client_that_does_not_know_yet_still_gets_its_call_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only of our own edge: grpc's does as much, at times of its own."""
    monkeypatch.setattr(grpc_serving, "EDGE", "h2")
    async with serving(says("a")) as served, peer(served) as client:
        leaving = asyncio.create_task(served.ingress.last_call())
        while client.goaway is None:
            await client.read()
        assert client.goaway.last_stream_id == (1 << 31) - 1
        client.call(1)
        assert (await client.answer(1)).status == 0
        assert await client.end() == 0
        assert client.goaway.last_stream_id == 1
        await client.close()
        await within(leaving)
